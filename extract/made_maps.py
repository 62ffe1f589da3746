"""Maps that are computed from a teacher's tokens, as the cache stores them: `text` and `kmeans`.

Both compare every token with a few vectors, the codebook, which is made once and kept in the cache. What a shard's values are follows
from its column and that file alone: teachers added later, appended images and other processes get the same.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from mrmae.common.kmeans import fit_centroids, nearest_ids
from mrmae.common.progress import Progress
from mrmae.extract.maps import IDS, MOST_ID, SCORES
from mrmae.shards.format import CALIBRATION_SAMPLES, NAME, TeacherSpec, derived_specs

MADE_FORM = "NAME=text:TEACHER:PROMPTS.txt or NAME=kmeans:TEACHER[.TAP]:K"
STORED_ALREADY = ("attention", "norm")  # arrays of every column
MOST_PROMPTS, MOST_PROMPT_LETTERS = 4096, 1000  # they stand in plan.json
ROUNDS = 20  # of Lloyd's at most


@dataclasses.dataclass(frozen=True)
class MadeMap:
    """A computed map as it was asked for. text: of the command. made: `text` or `kmeans`. teacher: NAME or NAME.TAP. k: 0 of prompts."""

    text: str
    name: str
    made: str
    teacher: str
    prompts: tuple[str, ...] = ()
    k: int = 0

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"--map {self.text}"

    @property
    def teacher_name(self) -> str:
        """The teacher's name, without a tap."""
        return self.teacher.partition(".")[0]

    def spec(self, of: str, source: TeacherSpec) -> TeacherSpec:
        """The map as a column of a cache. of: the column whose tokens it compares, stored or derived; source: the stored one."""
        grid, made = source.grid, {"made": self.made, "of": of, "source": source.column}
        return TeacherSpec(
            name=self.name, library="map", model=SCORES if self.made == "text" else IDS, weights=source.weights, tag=source.tag,
            weights_sha256=source.weights_sha256, activation=None, input_size=grid, mean=(), std=(), interpolation="none",
            antialias=False, tap="map", prefix_tokens=0, native_grid=grid, grid=grid, resample="none", width=1, has_cls=False,
            has_attention=False, precision="fp32", attention_backend="none",
            model_options={**made, **({"k": self.k} if self.k else {"prompts": list(self.prompts)})},
        )  # fmt: skip


def is_made(text: str) -> bool:
    """Whether the text of a --map asks for one that is computed. ValueError for what is in every column already."""
    name, _, how = text.partition("=")
    kind, colon, teacher = how.partition(":")
    if colon and kind in STORED_ALREADY:
        raise ValueError(f"--map {text}: every column holds its teacher's {kind} of each patch already; recipes read it as a saliency map "
                         f"(mask.source={'norm:' * (kind == 'norm')}{teacher or 'TEACHER'}); leave {name} out")  # fmt: skip
    return bool(colon) and kind in ("text", "kmeans")


def parse_made(text: str, *, images: int, grid: int) -> MadeMap:
    """The map of `NAME=text:TEACHER:FILE` or `NAME=kmeans:TEACHER:K`. ValueError where it has not that form, and for a K or FILE that cannot be."""
    name, _, how = text.partition("=")
    made, _, rest = how.partition(":")
    teacher, colon, last = rest.partition(":")
    if not (NAME.fullmatch(name) and colon and last and all(NAME.fullmatch(part) for part in teacher.split(".", 1))):
        raise ValueError(f"--map {text}: has not the form of a computed map; expected {MADE_FORM}; correct it")
    if made == "text":
        return MadeMap(text, name, made, teacher, prompts=read_prompts(Path(last), text))
    k, tokens = int(last) if last.isascii() and last.isdecimal() else 0, min(images, CALIBRATION_SAMPLES) * grid * grid
    if not 2 <= k <= MOST_ID + 1:
        raise ValueError(
            f"--map {text}: K is {last}; expected a whole number of 2 to {MOST_ID + 1}, which uint16 holds; correct it"
        )
    if k > tokens:
        raise ValueError(f"--map {text}: K is {k}; the centroids are fitted to the first {min(images, CALIBRATION_SAMPLES)} images, which "
                         f"have {tokens} tokens; expected fewer centroids; choose a smaller K, or begin with more images")  # fmt: skip
    return MadeMap(text, name, made, teacher, k=k)


def read_prompts(file: Path, text: str) -> tuple[str, ...]:
    """The lines of a file that hold something. ValueError where there is none, or they are no prompts."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--map {text}: {file} cannot be read ({error}); expected a text file (UTF-8) with a prompt per line; write "
                         "one") from None  # fmt: skip
    prompts = tuple(line.strip() for line in lines if line.strip())
    longest = max(prompts, key=len, default="")
    if not prompts or len(prompts) > MOST_PROMPTS or len(longest) > MOST_PROMPT_LETTERS:
        what = (
            f"{len(prompts)} prompts" if len(longest) <= MOST_PROMPT_LETTERS else f"a prompt of {len(longest)} letters"
        )
        raise ValueError(f"--map {text}: {file} has {what}; expected 1 to {MOST_PROMPTS} lines of at most {MOST_PROMPT_LETTERS} letters, "
                         "a prompt each; correct the file")  # fmt: skip
    return prompts


def source_for(
    asked: MadeMap, specs: Sequence[TeacherSpec], tail_of: Callable[[str], Mapping[str, object]]
) -> tuple[str, TeacherSpec]:
    """(the column whose tokens are compared, the stored column that they follow from). ValueError where there is no such one.

    specs: of the columns asked for. tail_of: a teacher's tail by name, empty where there is none.
    """
    stored = {spec.column: spec for spec in specs}
    derived = derived_specs(specs, tail_of)
    mine = [column for column, spec in stored.items() if spec.name == asked.teacher_name]
    every = [column for column in (*mine, *derived) if column.startswith(f"{asked.teacher_name}.")]
    if asked.made == "text":
        column, lacks = (
            f"{asked.teacher_name}.projected",
            "has no projection of its patch tokens into the space of texts",
        )
    elif "." in asked.teacher:
        column, lacks = asked.teacher, "is not asked for"
    else:
        column, lacks = mine[0] if len(mine) == 1 else "", f"has {len(mine)} columns; expected one of them by its name"
    if column in stored:
        return column, stored[column]
    if column in derived:
        return column, stored[derived[column][1]]
    raise ValueError(
        f"{asked.where}: {asked.teacher} {lacks}; it has {', '.join(every) or 'no column'}; choose another, or another teacher"
    )


# --- codebooks


def fit_kmeans(tokens: Float[Tensor, "n d"], k: int, where: str) -> Float[Tensor, "k d"]:
    """k centroids of the tokens, float32 on the host. ValueError where they are fewer than k different ones."""
    with Progress(f"k-means of {k}", ROUNDS) as progress:
        centroids = fit_centroids(tokens, k, rounds=ROUNDS, progress=progress.add).cpu()
    if len(centroids) < k:
        raise ValueError(f"{where}: the {len(tokens)} tokens of the first images are only {len(centroids)} different ones; expected at "
                         f"least {k}; choose a smaller K")  # fmt: skip
    return centroids


# --- values


def compared_tokens(tokens: Float[Tensor, "b l d"], vectors: Float[Tensor, "k d"], made: str) -> Shaped[Tensor, "b l"]:
    """What a computed map says of tokens: the id of the nearest centroid, uint16, or the largest cosine with a prompt, float16.

    vectors: the codebook; those of prompts have length 1.
    """
    flat = tokens.flatten(0, 1)
    if made == "kmeans":
        return nearest_ids(flat, vectors).view(tokens.shape[:2]).to(torch.uint16)
    return (F.normalize(flat, dim=-1) @ vectors.T).amax(-1).view(tokens.shape[:2]).half()


def made_in_words(spec: TeacherSpec) -> str:
    """What a computed map was made of."""
    options = spec.model_options
    if spec.made == "kmeans":
        return f"nearest of {options['k']} centroids of {options['of']}"
    prompts = [repr(prompt) for prompt in options["prompts"]]
    more = f" and {len(prompts) - 3} more" if len(prompts) > 3 else ""
    return f"cosine of {options['of']} with {'the nearest of ' * (len(prompts) > 1)}{', '.join(prompts[:3])}{more}"
