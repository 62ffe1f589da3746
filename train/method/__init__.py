"""What is learnt, as pure functions of a recipe, a batch and its masks: no files, no cache."""

from mrmae.train.method.decoders import MaskDecoder
from mrmae.train.method.distances import DISTANCES, Distance
from mrmae.train.method.hog import hog_targets
from mrmae.train.method.masks import Draw, Masks, buckets, check_blocks, counts, draw_of
from mrmae.train.method.mcmae import PATCH, SIZES, MaskedConvViT, build_mcmae
from mrmae.train.method.model import Pretrainer, build_model, evaluating, student_size, usual_students
from mrmae.train.method.recipe import (
    DecoderRecipe,
    Optim,
    Recipe,
    as_begun,
    difference,
    from_dict,
    load_recipe,
    recipe_summaries,
    recipe_text,
    replaced,
    to_dict,
)
from mrmae.train.method.samplers import chosen_blocks, draw_masks
from mrmae.train.method.student import LN_EPS, POSITION_TABLES, build_vit, initialise, sincos_positions, vit_arguments
from mrmae.train.method.targets import (
    ADD,
    NEEDS_STATISTICS,
    Batch,
    CacheInfo,
    Rows,
    TeacherInfo,
    TeacherStatistics,
    chosen,
    target_names,
)
from mrmae.train.method.terms import PixelScale, Term, as_compared, needed_arrays, patch_targets

__all__ = [
    "ADD",
    "Batch",
    "CacheInfo",
    "DISTANCES",
    "DecoderRecipe",
    "Distance",
    "Draw",
    "LN_EPS",
    "MaskDecoder",
    "MaskedConvViT",
    "Masks",
    "NEEDS_STATISTICS",
    "Optim",
    "PATCH",
    "POSITION_TABLES",
    "PixelScale",
    "Pretrainer",
    "Recipe",
    "Rows",
    "SIZES",
    "TeacherInfo",
    "TeacherStatistics",
    "Term",
    "as_begun",
    "as_compared",
    "buckets",
    "build_mcmae",
    "build_model",
    "build_vit",
    "check_blocks",
    "chosen",
    "chosen_blocks",
    "counts",
    "difference",
    "draw_masks",
    "draw_of",
    "evaluating",
    "from_dict",
    "hog_targets",
    "initialise",
    "load_recipe",
    "needed_arrays",
    "patch_targets",
    "recipe_summaries",
    "recipe_text",
    "replaced",
    "sincos_positions",
    "student_size",
    "target_names",
    "to_dict",
    "usual_students",
    "vit_arguments",
]
