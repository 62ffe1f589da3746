"""The pre-training model of a recipe on a cache: student, decoder, heads, and the loss of one batch.

`build_model` checks that cache and recipe fit; `Pretrainer.forward` is one static graph: no host sync, no branch on data.
"""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mrmae.common.device import without_numbers
from mrmae.common.progress import counted
from mrmae.kernels import dispatch
from mrmae.kernels.ids import mix
from mrmae.kernels.reference import NORM_PIX_EPS
from mrmae.train.method import mcmae
from mrmae.train.method.boxes import BoxHead
from mrmae.train.method.decoders import (
    DECODERS,
    Decoder,
    MaskDecoder,
    PairDecoder,
    Regressor,
    blocks_read,
    reads_final,
)
from mrmae.train.method.drop_path import path_factors, path_keys
from mrmae.train.method.follower import Follower
from mrmae.train.method.heads import HEADS
from mrmae.train.method.hog import hog_width
from mrmae.train.method.masks import Masks, counts, reads_saliency, saliency_arrays
from mrmae.train.method.mcmae import PATCH, SIZES, MaskedConvViT, build_mcmae
from mrmae.train.method.mto import mask_token_loss
from mrmae.train.method.recipe import PARTNER, PruneRecipe, Recipe, StudentRecipe
from mrmae.train.method.student import POSITION_TABLES, Encoded, build_vit, encode_vit, hold_key_bias, initialise
from mrmae.train.method.taps import Tokens, blocks_behind, build_fusions, placed, tokens_at, whole_at
from mrmae.train.method.targets import Batch, CacheInfo, TeacherStatistics
from mrmae.train.method.terms import PixelScale, Term, bind_terms, check_heads, check_taps, score

USUAL_STUDENTS = ("test_vit", "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224",
                  "vit_huge_patch14_224", "mcmae_base", "mcmae_large")  # fmt: skip


def build_model(
    recipe: Recipe, info: CacheInfo, *, kernels: dispatch.Kernels = "auto", dtype: torch.dtype = torch.float32
) -> "Pretrainer":
    """The model of `recipe` on a cache, on the CPU, with initial weights that depend on the recipe's seed only.

    dtype: float64 for exact comparisons. Raises ValueError where recipe and cache do not fit, naming what to change.
    """
    model = Pretrainer(recipe, info, kernels)
    initialise(model, recipe.seed)
    model.to(dtype)
    model.fill_constants(dtype)
    model.follow(0.0)
    return model


class Pretrainer(nn.Module):
    """Student (a timm VisionTransformer or MCMAE's), decoder or None, fusions, one head per term, the teachers' constants.

    Parameters: `student.*` are timm's (or MCMAE's) own names; `decoder.*`, `fusions.*` and `heads.*` are dropped after
    training. Parts of the student that no term reads do not train. Constants are there after `fill_constants` only.
    """

    scale: Tensor
    shift: Tensor
    path_keys: Tensor

    def __init__(self, recipe: Recipe, info: CacheInfo, kernels: dispatch.Kernels = "auto") -> None:
        super().__init__()
        assert info.patch  # a grid that does not cut the view is refused before anything counts its patches
        check_channels(recipe, info)
        self.recipe, self.info, self.kernels = recipe, info, kernels
        self.n_keep, self.n_predict = counts(recipe.mask, info.n_patches)
        self.terms = bind_terms(recipe, info)
        if reads_saliency(recipe.mask):
            saliency_arrays(recipe.mask.source, info)
        self.student = build_student(recipe, info)
        width, depth, fused = self.student.embed_dim, len(self.student.blocks), recipe.student.fused_blocks
        check_pruning(recipe.student.prune, depth, self.n_keep)
        check_mixing(recipe, self.student)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if recipe.student.hidden == "replace" else None
        joined = recipe.mask.joined if recipe.student.source_embedding else None
        self.source_tokens = None if joined is None else nn.Parameter(torch.zeros(1, joined, width))
        self.keep_blocks = check_taps(
            self.terms,
            fused,
            depth=depth,
            hidden=(self.n_predict, info.n_patches - self.n_keep),
            has_cls=self.student.num_prefix_tokens > 0,
            fuses=isinstance(self.student, MaskedConvViT),
        )
        taps = {tap for term in self.terms for tap in term.recipe.taps}
        self.fusions = build_fusions(sorted(taps), fused, width=width, depth=depth)
        outputs_read = {i for tap in taps if not tap.startswith("qkv") for i in blocks_behind(tap, fused, depth)}
        self.decoder: Decoder | None = None
        decoder = recipe.student.decoder
        if decoder is not None and not taps.isdisjoint(("decoder", "decoded")):
            self.keep_blocks |= blocks_read(decoder, depth)
            outputs_read |= blocks_read(decoder, depth)
            self.decoder = DECODERS[decoder.kind](width, decoder, info.grid, depth)
            taps |= {"final"} if reads_final(decoder) else set()
        self.regularised = "mto" in taps
        if self.regularised and not isinstance(self.decoder, MaskDecoder):
            check_mask_tokens(recipe, self.mask_token)
            self.keep_blocks |= {0, 1}
            outputs_read |= {1}
        self.boxes: BoxHead | None = None
        if recipe.student.boxes is not None and "boxes" in taps:
            self.boxes = BoxHead(width, recipe.student.boxes)
            taps |= {"final"}
        check_own_targets(recipe, taps)
        self.heads = self.build_heads()
        self.statistics = nn.ModuleDict()
        self.reads_partner = isinstance(self.decoder, PairDecoder) or any(
            (term.recipe.views, term.recipe.of) != ("first", "same") for term in self.terms
        )
        self.register_buffer("path_keys", path_keys(depth, recipe.seed), persistent=False)
        self.keep_qkv = {int(tap.removeprefix("qkv")) for tap in taps if tap.startswith("qkv")}
        self.half_read = leave_unread(self.student, taps, self.keep_blocks, read=outputs_read)
        self.blocks_cut = depth - len(self.student.blocks)
        copied = any(term.recipe.target == "ema" for term in self.terms)
        self.follower = Follower(self.student, dict(self.heads.items())) if copied else None

    def build_heads(self) -> nn.ModuleDict:
        """A head per term, one for several where they share it."""
        heads = nn.ModuleDict()
        for term in self.terms:
            check_heads(term, self.info, self.student.embed_dim)
            width_in = self.width_of(term)
            told = width_in if term.recipe.relation else self.width_of_target(term)
            heads[term.name] = HEADS[term.recipe.head](width_in, told)
        for term in self.terms:
            if term.recipe.head_of is not None:
                heads[term.name] = heads["".join([term.recipe.head_of, *term.name.partition("/")[1:]])]
        return heads

    def follow(self, momentum: float) -> None:
        """Let the copy that terms with target `ema` predict follow the student, after an update; 0 makes it the student."""
        if self.follower is not None:
            self.follower.follow(self.student, dict(self.heads.items()), momentum)

    def fill_constants(self, dtype: torch.dtype) -> None:
        """Compute what is not learned in `dtype`: pixel scale and shift, positions, the teachers' statistics."""
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (self.recipe.prepare.mean, self.recipe.prepare.std))
        self.register_buffer("scale", (1 / (self.info.unit * std)).to(dtype), persistent=False)
        self.register_buffer("shift", (-mean / std).to(dtype), persistent=False)
        table, grid = POSITION_TABLES[self.recipe.student.positions], self.info.grid
        own = table(grid, self.student.embed_dim)[1 - self.student.num_prefix_tokens :]
        for encoder in [self.student, *([] if self.follower is None else [self.follower.student])]:
            assert encoder.pos_embed is not None
            encoder.get_parameter("pos_embed").data = own.to(dtype)[None]
        if self.decoder is not None:
            self.decoder.position = table(grid, self.decoder.position.shape[1])[1:].to(dtype)
        wanted = {
            term.name: (term.teacher, term.recipe.transform, term.recipe.at("cls"))
            for term in self.terms
            if term.teacher is not None
        }
        made = {
            key: TeacherStatistics(self.info.target(key[0]), dtype, key[1], cls=key[2])
            for key in dict.fromkeys(wanted.values())
        }
        self.statistics.update({name: made[key] for name, key in wanted.items()})

    def width_of(self, term: Term) -> int:
        """Channels of the tokens that a term's head reads. Raises ValueError where its taps differ."""
        decoder, boxes = self.recipe.student.decoder, self.recipe.student.boxes
        if boxes is not None and term.recipe.tap == "boxes":
            return boxes.width
        if term.recipe.tap == "mto":
            return 1
        widths = [
            decoder.width
            if decoder is not None and tap in ("decoder", "decoded")
            else self.student.embed_dim * (3 if tap.startswith("qkv") else 1)
            for tap in term.recipe.taps
        ]
        if len(set(widths)) > 1:
            raise ValueError(
                f"term {term.name}: one head reads taps {term.recipe.tap}, which are {' and '.join(map(str, widths))} channels wide; equal widths were "
                f"expected; use --set student.decoder.width={self.student.embed_dim}"
            )
        return widths[0]

    def width_of_target(self, term: Term) -> int:
        """Numbers that a term predicts per token. Raises ValueError for a target that patches of this size do not have."""
        info = self.info
        if term.teacher is not None:
            return info.target(term.teacher).width
        if term.recipe.map is not None:
            return term.recipe.classes or info.vectors[term.recipe.map]
        if term.recipe.target == "ema":
            return self.student.embed_dim
        if term.recipe.target == "self":
            return self.decoder.position.shape[1] if isinstance(self.decoder, Regressor) else self.student.embed_dim
        if term.recipe.target == "labels":
            return len(info.classes)
        if term.recipe.target == "none":
            return 1
        if term.recipe.target in ("sources", "views"):
            return self.student.embed_dim
        if term.recipe.target == "boxes":
            assert (boxes := self.recipe.student.boxes) is not None
            return math.prod(boxes.crop) // boxes.cells**2 * info.channels
        return hog_width(info.patch, info.channels) if term.recipe.target == "hog" else info.patch**2 * info.channels

    @property
    def pixels(self) -> PixelScale:
        """How the student reads an image."""
        return PixelScale(self.info.patch, self.scale, self.shift)

    def forward(self, batch: Batch, masks: Masks) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss (fp32), and each term's own value, unweighted and detached."""
        return score(
            self.terms,
            self.heads,
            self.statistics,
            self.taps(batch, masks, paths=self.paths(batch, masks)) | self.own_targets(batch, masks),
            batch,
            masks,
            pixels=self.pixels,
            source=self.recipe.mask.source,
            kernels=self.kernels,
            boxes=self.recipe.student.boxes,
        )

    def taps(self, batch: Batch, masks: Masks, *, paths: Tensor | None = None) -> dict[str, Tokens]:
        """The named outputs the terms read: the encoder's at `ids_keep`, after CLS where the student has one, `decoder` at `ids_predict`.

        Where mask tokens stand for hidden patches in the encoder, its taps also hold `ids_predict`. The names of a partner's begin with PARTNER.
        """
        taps, read = self.encoder_taps(batch, masks, paths)
        if partner := partner_of(batch, masks) if self.reads_partner else None:
            view, shown = partner
            others, _ = self.encoder_taps(view, shown, self.paths(view, shown) if paths is not None else None)
            taps |= {f"{PARTNER}{name}": tokens for name, tokens in others.items()}
        if self.decoder is not None:
            n = self.student.num_prefix_tokens + masks.ids_keep.shape[1]
            seen = Tokens(taps["final"].x[:, :n], masks.ids_keep, taps["final"].prefix, masks.ids_keep.shape[1])
            read = {i: x[:, :n] for i, x in read.items()}
            if isinstance(self.decoder, PairDecoder):
                taps["decoder"] = self.decoder(seen, masks.ids_predict, read, taps[f"{PARTNER}final"])
            elif isinstance(self.decoder, MaskDecoder):
                entering: list[Tensor] = []
                taps["decoder"] = self.decoder(seen, masks.ids_predict, read, entering)
                if self.regularised:
                    taps["mto"] = self.mask_token_tap(entering, masks.ids_keep.shape[1])
            else:
                taps["decoder"] = self.decoder(seen, masks.ids_predict, read)
            if isinstance(self.decoder, Regressor) and len(self.decoder.behind):
                taps["decoded"] = self.decoder.decoded(taps["decoder"])
        if self.boxes is not None:
            assert batch.boxes is not None
            taps["boxes"] = self.boxes(taps["final"], batch.boxes, self.info.patch)
        return taps

    def encoder_taps(
        self, batch: Batch, masks: Masks, paths: Tensor | None
    ) -> tuple[dict[str, Tokens], dict[int, Tensor]]:
        """The taps of the encoder alone, and the raw block outputs behind them."""
        ids, prefix, shown = masks.ids_keep, self.student.num_prefix_tokens, masks.ids_keep.shape[1]
        hidden = None
        if self.mask_token is not None:
            ids = torch.cat([ids, masks.ids_predict], dim=1)
            hidden = torch.cat([masks.ids_predict, complement(ids, self.info.n_patches)], dim=1)
        group = self.recipe.mask.joined if shown < self.info.n_patches else 1  # whole images are not mixed
        how: dict[str, Any] = {"ids_hidden": hidden, "prune": self.recipe.student.prune, "paths": paths}
        encoded = self.encode(batch.pixels, masks.ids_keep, group=group, **how)
        entering = [x for i, x in encoded.blocks.items() if i in (0, 1)]
        final, blocks, qkv, alive = encoded.change(lambda x: x[:, : prefix + ids.shape[1]])
        outputs = (
            {"final": final} | {f"block{i}": x for i, x in blocks.items()} | {f"qkv{i}": x for i, x in qkv.items()}
        )
        outputs |= {name: fusion(blocks, self.student.norm) for name, fusion in self.fusions.items()}
        taps = {name: Tokens(x, ids, prefix, shown) for name, x in outputs.items()}
        if alive:
            at = {name: int(name.removeprefix("block").removeprefix("qkv")) for name in outputs if name != "final"}
            left = {name: alive[at.get(name, len(alive) - 1)] for name in outputs}
            taps = {name: Tokens(x, left[name], prefix, left[name].shape[1]) for name, x in outputs.items()}
        assert self.student.pos_embed is not None
        for name in self.fusions:
            if name.startswith("placed"):
                taps[name] = placed(taps[name], self.student.pos_embed[0, prefix:])
        if self.regularised and not isinstance(self.decoder, MaskDecoder):
            taps["mto"] = self.mask_token_tap(entering, shown)
        return taps, blocks

    def mask_token_tap(self, entering: list[Tensor], visible: int) -> Tokens:
        """Tap `mto`: a number per row, of MAE's decoder, without it of the encoder; entering: what enters its first blocks."""
        if isinstance(self.decoder, MaskDecoder):
            blocks, token = list(self.decoder.blocks), self.decoder.mask_token
        else:
            assert self.mask_token is not None
            blocks, token = list(self.student.blocks), self.mask_token
        value = mask_token_loss(blocks, entering, token, prefix=self.student.num_prefix_tokens, visible=visible)
        return Tokens(value, torch.zeros(value.shape[:2], dtype=torch.int64, device=value.device))

    @torch.no_grad()
    def own_targets(self, batch: Batch, masks: Masks) -> dict[str, Tokens]:
        """What terms with target `self` and `ema` predict, as taps `target/NAME`, token by token.

        self: the encoder's output on [CLS | predicted patches], all branches running; behind the Linear and the LayerNorm through which
        a regressor of another width sees the encoder (CAE, arXiv 2202.03026). ema: the copy's output on the whole view (`pooled`: the mean
        of all its patches), behind the copy of the term's projector where its head has one (LUT, arXiv 2310.13593).
        """
        found: dict[str, Tokens] = {}
        own, copied = ([term for term in self.terms if term.recipe.target == target] for target in ("self", "ema"))
        prefix = self.student.num_prefix_tokens
        if own:
            x = self.encode(batch.pixels, masks.ids_predict).final[:, prefix:]
            x = self.decoder.embed(x) if isinstance(self.decoder, Regressor) else x
            found |= {f"target/{term.name}": Tokens(x, masks.ids_predict) for term in own}
        if not copied or self.follower is None:
            return found
        partner = partner_of(batch, masks) if self.reads_partner else None
        views = {"": (batch, masks)} | ({} if partner is None else {PARTNER: partner})
        wholes = {side: self.whole(view.pixels, self.follower.student) for side, (view, _) in views.items()}
        for term in copied:
            for side in term.recipe.sides:
                source = side if term.recipe.of == "same" else other_side(side)
                x = whole_at(wholes[source], term.recipe.positions, views[side][1])
                if term.name in self.follower.projectors:
                    x = self.follower.projectors[term.name](x)
                found[f"{side}target/{term.name}"] = Tokens(x, views[side][1].ids_keep)
        return found

    def whole(self, pixels: Shaped[Tensor, "b h w c"], student: VisionTransformer | MaskedConvViT) -> Tokens:
        """`final` of all patches of unmasked images, by an encoder of the student's form."""
        everything = torch.arange(self.info.n_patches, device=pixels.device).expand(len(pixels), -1)
        final = self.encode(pixels, everything, student=student).final
        return Tokens(final, everything, self.student.num_prefix_tokens, everything.shape[1])

    def encode(
        self,
        pixels: Shaped[Tensor, "b h w c"],
        ids_keep: Int64[Tensor, "v k"],
        *,
        ids_hidden: Int64[Tensor, "v h"] | None = None,
        group: int = 1,
        prune: PruneRecipe | None = None,
        paths: Tensor | None = None,
        student: VisionTransformer | MaskedConvViT | None = None,
    ) -> Encoded:
        """`final` of the visible patches, after CLS where the student has one, and of the blocks what taps need.

        ids_hidden: where the mask token stands for a patch; these tokens come last. group: images that share a sequence. student: the encoder, if another than the model's own.
        """
        student = student or self.student
        common: dict[str, Any] = {
            "scale": self.scale,
            "shift": self.shift,
            "keep_blocks": self.keep_blocks,
            "kernels": self.kernels,
        }
        if isinstance(student, MaskedConvViT):
            return Encoded(*mcmae.encode_mcmae(student, pixels, ids_keep, **common))
        hidden = None if self.mask_token is None or ids_hidden is None else (self.mask_token, ids_hidden)
        common |= {"group": group, "sources": self.source_tokens if group > 1 else None}
        return encode_vit(
            student, pixels, ids_keep, hidden=hidden, keep_qkv=self.keep_qkv, prune=prune, paths=paths, **common
        )

    def paths(self, batch: Batch, masks: Masks) -> Tensor | None:
        """Which residual branches run in this training step; None for all of them."""
        asked, rows = self.recipe.student, len(masks.ids_keep)
        if not self.training or asked.drop_path == 0:
            return None
        rate, law = asked.drop_path, asked.drop_path_law
        return path_factors(batch.samples, batch.epoch, self.path_keys, rows=rows, rate=rate, law=law)

    @torch.no_grad()
    def tokens(self, pixels: Shaped[Tensor, "b h w c"]) -> Float[Tensor, "b l d"]:
        """The `final` tokens of all patches of unmasked images; of a plain ViT what timm's `forward_features` gives after CLS."""
        everything = torch.arange(self.info.n_patches, device=pixels.device).expand(pixels.shape[0], -1)
        return self.encode(pixels, everything).final[:, self.student.num_prefix_tokens :]

    @torch.no_grad()
    def embedded(self, pixels: Shaped[Tensor, "b h w c"]) -> Float[Tensor, "b l d"]:
        """Every patch's embedding with its position, in the weights' own precision: what sampler `similarity` compares."""
        assert isinstance(self.student, VisionTransformer) and self.student.pos_embed is not None
        everything = torch.arange(self.info.n_patches, device=pixels.device).expand(len(pixels), -1)
        proj = self.student.patch_embed.proj
        with torch.autocast(pixels.device.type, enabled=False):
            patches = self.patches_at(pixels, everything)
            position = self.student.pos_embed[:, self.student.num_prefix_tokens :]
            return F.linear(patches, proj.weight.flatten(1), proj.bias) + position

    @torch.no_grad()
    def predicted(self, term: Term, batch: Batch, masks: Masks) -> Tokens:
        """What a term's head says of patches: of all, from the whole view, where it reads visible ones of an encoder; else as it is trained."""
        positions = term.recipe.positions
        if not term.recipe.decoded and (self.mask_token is None or not term.recipe.at("predicted")):
            everything = torch.arange(self.info.n_patches, device=batch.pixels.device).expand(len(batch.pixels), -1)
            masks, positions = Masks(everything, everything[:, :0], ids_partner=masks.ids_partner), "visible"
        tokens = tokens_at(self.taps(batch, masks), term.recipe.taps, positions).at("alive")
        return tokens._replace(x=self.heads[term.name](tokens.x))

    @torch.no_grad()
    def reconstruct(self, batch: Batch, masks: Masks, *, alone: bool = False) -> Float[Tensor, "b h w c"]:
        """Images, 1 standing for the views' unit, in [0, 1] but for floats: visible patches as they are, predicted ones by the pixel term, grey where nothing is known.

        Predictions of normalised pixels are de-normalised with the mean and variance of the true patch, as MAE's pictures are;
        alone: with those of the image's visible patches together, so that nothing comes from what is hidden.
        Raises ValueError when the recipe predicts no pixels.
        """
        term = next((term for term in self.terms if term.recipe.target == "pixels"), None)
        if term is None:
            raise ValueError(
                f"recipe {self.recipe.name}: predicts no pixels; a term with target pixels was expected to draw them"
            )
        prediction = self.heads[term.name](tokens_at(self.taps(batch, masks), term.recipe.taps, "predicted").x).to(
            self.scale.dtype
        )
        visible = self.patches(batch, masks.ids_keep)
        if term.recipe.transform != "none":
            correction = 0 if term.recipe.transform == "norm_pix_biased" else 1
            patches = visible if alone else self.patches(batch, masks.ids_predict)
            var, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=correction)
            var, mean = (x.mean(1, keepdim=True) if alone else x for x in (var, mean))
            prediction = prediction * (var + NORM_PIX_EPS).sqrt() + mean
        b, values = prediction.shape[0], visible.shape[2]
        grey = self.to_values(torch.full_like(visible[:1, :1], 0.5)).expand(b, self.info.n_patches, values)
        known = grey.scatter(1, masks.ids_keep[..., None].expand(-1, -1, values), visible)
        drawn = known.scatter(1, masks.ids_predict[..., None].expand(-1, -1, values), prediction)
        image = unpatchify(drawn, self.info.grid, self.info.patch)
        image = (image - self.shift) / (self.info.unit * self.scale)
        return image if self.info.unit == 1 else image.clamp(0, 1)

    def patches(self, batch: Batch, ids: Tensor) -> Float[Tensor, "b n P"]:
        """The patches at `ids` as the student reads them."""
        return self.patches_at(batch.pixels, ids)

    def patches_at(self, pixels: Shaped[Tensor, "b h w c"], ids: Tensor) -> Float[Tensor, "b n P"]:
        """The patches of these images at `ids` as the student reads them."""
        return dispatch.gather_patches(
            pixels,
            ids,
            patch=self.info.patch,
            scale=self.scale,
            shift=self.shift,
            channels_last=True,
            dtype=self.scale.dtype,
            kernels=self.kernels,
        )

    def to_values(self, unit: Float[Tensor, "b n P"]) -> Float[Tensor, "b n P"]:
        """Patches in [0, 1], flattened (c, p, q), as the student reads them."""
        side = self.info.patch**2
        return unit * self.info.unit * self.scale.repeat_interleave(side) + self.shift.repeat_interleave(side)

    def describe(self) -> dict[str, str]:
        """What was built, in words, for the plan that `--dry-run` prints."""
        info, trainable = self.info, [p for p in self.parameters() if p.requires_grad]
        decoder = self.recipe.student.decoder
        told = {
            "student": f"{self.recipe.student.model} as patch {info.patch} at {info.size} px,"
            f" grid {info.grid[0]} x {info.grid[1]}, width {self.student.embed_dim}, {counted(len(self.student.blocks), 'block')}"
            + self.left_words(),
            "decoder": "none"
            if self.decoder is None or decoder is None
            else f"{decoder.kind}, {counted(decoder.depth, 'block')} of width {decoder.width}",
            "mask": self.mask_words(),
            "parameters": f"{count(trainable):,}, of them {count(self.student.parameters()):,} in the student",
        }
        return told | {f"term {term.name}": str(term) for term in self.terms}

    def mask_words(self) -> str:
        """Who is visible and predicted, what the encoder sees of the others, and who leaves it on the way."""
        prune, left = self.recipe.student.prune, ""
        if prune is not None:
            alive = ", ".join(map(str, prune.alive(self.n_keep)))
            left = f"; before blocks {', '.join(map(str, prune.before))} the redundant leave: {alive} alive"
        if self.recipe.student.hidden == "none":
            return f"none: all {self.info.n_patches} patches visible{left}"
        tokens = "; mask tokens stand for hidden patches in the encoder" * (self.mask_token is not None)
        return f"{self.recipe.mask.sampler}: {self.n_keep} of {self.info.n_patches} patches visible, {self.n_predict} predicted{tokens}{left}"

    def left_words(self) -> str:
        """What is left out of the named student, or left at its start, because no term reads it; empty for nothing."""
        cut = f"; its last {counted(self.blocks_cut, 'block')}, which no term reads, left out" * bool(self.blocks_cut)
        norm = "; the final norm, which no term reads, stays at its start"
        rest = f"; of its block {len(self.student.blocks)} only queries, keys and values are read: the rest stays at its start"
        return cut + rest * self.half_read + norm * (not any(p.requires_grad for p in self.student.norm.parameters()))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode; afterwards, also after an error, every module and the random stream are as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {x.device for x in model.parameters() if x.is_cuda}
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def partner_of(batch: Batch, masks: Masks) -> tuple[Batch, Masks]:
    """The partners' views and who of them is visible; none of them is predicted. Their drop path is drawn apart from the images'.

    Raises ValueError where the batch has none.
    """
    if batch.partner is None or masks.ids_partner is None:
        raise ValueError(
            "prepare.pair: the batch has no partners, or the masks say nothing of them; a batch of pairs was expected; give Batch(partner=...)"
        )
    partner = replace(batch.partner, samples=mix(batch.partner.samples))
    return partner, Masks(masks.ids_partner, masks.ids_partner[:, :0])


def other_side(side: str) -> str:
    """What names the taps of the other view."""
    return "" if side else PARTNER


def check_pruning(prune: PruneRecipe | None, depth: int, n: int) -> None:
    """Raise ValueError where a student has not the blocks before which patches leave, or none of n patches would be left."""
    if prune is None:
        return
    if max(prune.before) > depth or prune.alive(n)[-1] < 1:
        raise ValueError(
            f"student.prune: before blocks {list(prune.before)} keep {prune.keep:g}, of {n} patches {prune.alive(n)} alive; at least one "
            f"patch, and blocks from 1 to {depth}, were expected; change student.prune"
        )


def check_mixing(recipe: Recipe, student: nn.Module) -> None:
    """Raise ValueError where images are to share a sequence of a student that is no plain ViT."""
    if recipe.mask.joined > 1 and not isinstance(student, VisionTransformer):
        raise ValueError(
            f"student {recipe.student.model!r}: mask.sampler = mix joins images behind the patch embedding; a plain ViT was expected; use "
            "--student vit_base_patch16_224, or another sampler"
        )


def check_mask_tokens(recipe: Recipe, mask_token: Tensor | None) -> None:
    """Raise ValueError where tap mto is read and neither a decoder that is read nor the encoder has mask tokens."""
    if mask_token is None:
        raise ValueError(
            f"recipe {recipe.name}: tap mto is of mask tokens that a term reads, and no term reads the decoder; one with tap decoder "
            "was expected; drop the term with tap mto, or add one"
        )


def check_own_targets(recipe: Recipe, taps: Collection[str]) -> None:
    """Raise ValueError where a term's target is the student's own final output and none reads that."""
    own = next((term.target for term in recipe.terms.values() if term.target in ("self", "ema")), None)
    if "final" not in taps and own is not None:
        raise ValueError(
            f"recipe {recipe.name}: target {own} is the student's final output, which no term reads; one that does was expected; "
            "use tap final or decoder"
        )


def complement(ids: Int64[Tensor, "v n"], l: int) -> Int64[Tensor, "v l-n"]:
    """The patches of a grid of l that are not among these, ascending."""
    free = torch.ones(len(ids), l, dtype=torch.uint8, device=ids.device).scatter(1, ids, 0)
    return free.argsort(dim=1, descending=True, stable=True)[:, : l - ids.shape[1]]


def count(parameters: Iterable[Tensor]) -> int:
    """How many numbers the trainable ones hold."""
    return sum(p.numel() for p in parameters if p.requires_grad)


def check_channels(recipe: Recipe, info: CacheInfo) -> None:
    """Raise ValueError unless mean and std have one number per image channel."""
    if len(recipe.prepare.mean) != info.channels:
        raise ValueError(
            f"recipe {recipe.name}: prepare.mean has {len(recipe.prepare.mean)} numbers; the cache's images have {info.channels} "
            "channels; give one mean and one std per channel, or have them measured: fit: [prepare.mean, prepare.std] in the recipe"
        )


def student_size(recipe: Recipe, info: CacheInfo) -> tuple[int, int]:
    """(width, depth) of the recipe's student; nothing is allocated. Raises ValueError like `build_student`."""
    with without_numbers():
        student = build_student(recipe, info)
    return student.embed_dim, len(student.blocks)


def build_student(recipe: Recipe, info: CacheInfo) -> VisionTransformer | MaskedConvViT:
    """The recipe's student for this cache's size and grid. Raises ValueError for unknown names and what does not fit them."""
    asked = recipe.student
    usual = {
        "drop_path": "0",
        "init_values": "null",
        "qkv_bias": "all",
        "cls": "true",
        "hidden": "drop",
        "prune": "null",
    }
    changed = {key: value for key in usual if (value := getattr(asked, key)) != getattr(StudentRecipe(), key)}
    vit: VisionTransformer | None = None
    if "mcmae" not in asked.model:
        vit = build_vit(
            asked.model,
            size=info.size,
            patch=info.patch,
            grid=info.grid,
            channels=info.channels,
            cls=asked.cls,
            init_values=asked.init_values,
        )
    elif not changed:
        return build_mcmae(asked.model, patch=info.patch, grid=info.grid, channels=info.channels)
    if vit is None or (changed and not all(type(block) is Block for block in vit.blocks)):
        key, value = next(iter(changed.items()))
        raise ValueError(
            f"student {asked.model!r}: student.{key} is {value} and its blocks are not plain transformer blocks; {usual[key]} was "
            f"expected; use --set student.{key}={usual[key]}"
        )
    if asked.qkv_bias == "qv":
        hold_key_bias(vit)
    return vit


def usual_students() -> dict[str, str]:
    """Width, depth, heads and parameters (at 224 px) of the usual students, by name. They are built without numbers: no memory."""
    found = {}
    for name in USUAL_STUDENTS:
        with without_numbers():
            built = (
                build_mcmae(name, patch=PATCH, grid=(14, 14))
                if name in SIZES
                else build_vit(name, size=224, patch=16, grid=(14, 14))
            )
        blocks: Any = built.blocks
        size = f"{len(blocks)} blocks, {blocks[0].attn.num_heads} heads, {count(built.parameters()) / 1e6:.1f} M parameters"
        found[name] = f"width {built.embed_dim}, {size}"
    return found


def leave_unread(
    student: VisionTransformer | MaskedConvViT,
    taps: Collection[str],
    keep_blocks: Collection[int],
    *,
    read: Collection[int],
) -> bool:
    """Take from a student what nothing reads, `final` not being among the taps: it would be computed, and exported, at its start.

    The blocks after the last one read are cut off. The final norm, which an encoder must have, and MCMAE's stage fusion stay and do not
    train: weight decay and data-parallel runs mistake parameters without a gradient. So does what follows q, k and v in the last block, where
    only these are read of it: True is returned. read: the blocks of which something reads the output.
    """
    if "final" in taps:
        return False
    last = max(keep_blocks)
    if isinstance(student, MaskedConvViT):
        student.blocks3 = student.blocks3[:last]
        for module in (student.stage1_output_decode, student.stage2_output_decode):
            module.requires_grad_(False)
    else:
        student.blocks = student.blocks[:last]
    if not any(tap == "learned" or tap.startswith("placed") for tap in taps):
        student.norm.requires_grad_(False)
    half = last not in read
    for name, parameter in student.blocks[-1].named_parameters() if half else ():
        parameter.requires_grad_(name.startswith(("norm1.", "attn.qkv.")))
    return half


def unpatchify(patches: Float[Tensor, "b l P"], grid: tuple[int, int], patch: int) -> Float[Tensor, "b h w c"]:
    """Patches flattened (c, p, q), in raster order, as images."""
    b, channels = patches.shape[0], patches.shape[2] // patch**2
    cells = patches.reshape(b, *grid, channels, patch, patch)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(b, grid[0] * patch, grid[1] * patch, channels)
