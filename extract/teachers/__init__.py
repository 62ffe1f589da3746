"""Frozen teachers: an address becomes a model whose features are tokens on a grid."""

from mrmae.extract.teachers.address import TeacherRequest, parse_teacher, without_text
from mrmae.extract.teachers.catalogue import list_teachers
from mrmae.extract.teachers.teacher import (
    DEFAULT_TEACHERS,
    Features,
    Teacher,
    build_teacher,
    make_spec,
    normalise,
    prompt_vectors,
    to_grid,
)
from mrmae.extract.teachers.tower import Origin, Preprocessing, Tower, activation_of
from mrmae.extract.teachers.weights import first_line, fit_weights, listed, load_weights, weights_sha256
from mrmae.extract.teachers.weights_file import kind_of

__all__ = [
    "DEFAULT_TEACHERS",
    "Features",
    "Origin",
    "Preprocessing",
    "Teacher",
    "TeacherRequest",
    "Tower",
    "activation_of",
    "build_teacher",
    "first_line",
    "fit_weights",
    "kind_of",
    "list_teachers",
    "listed",
    "load_weights",
    "make_spec",
    "normalise",
    "parse_teacher",
    "prompt_vectors",
    "to_grid",
    "weights_sha256",
    "without_text",
]
