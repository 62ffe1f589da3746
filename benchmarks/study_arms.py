"""The arms of the study as data, and the product commands that each of them is.

`DATA/` stands for the data root and `WORK/` for the folder of caches and runs, until a command runs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

Arm = dict[str, Any]

# MobileNetV2's last stage of stride 16 at 128 px is an 8 x 8 map: the student's own grid, nothing is resampled.
TEACHER = "cnn=timm:mobilenetv2_100@DATA/../weights/mobilenetv2_100_imagenet1k.safetensors?pad_type=same&mean=0.5&std=0.5&interpolation=bilinear&input_size={size}&tap=stage_4"
# Galileo-nano, a self-supervised ViT for satellite images: 8 x 8 tokens of 64 px, 128 channels, no CLS.
GALILEO = "gal=timm:vit_tiny_patch16_224@DATA/../weights/galileo_nano_s2rgb_p8.safetensors?embed_dim=128&depth=4&num_heads=8&patch_size=8&class_token=False&global_pool=&fc_norm=False&mean=-0.306276,-0.177525,-0.160025&std=1.589351,1.328435,1.334842"
# A DINOv2-S fine-tuned for saliency: a ViT with CLS, and hence attention, at 196 px.
DINO = "--teacher dino=timm:vit_small_patch14_dinov2@DATA/../weights/dinov2s_saliency_finetuned_fp16.safetensors"
TAPS = f"{DINO}?tap={','.join(f'block_{i}' for i in range(8, 13))}"
BOTH = f"--teacher {GALILEO} --teacher {TEACHER.format(size=128)}"
CLOTHING = "DATA/clothing-small.tar"
PHOTOS = {"eurosat": "DATA/eurosat-rgb.tar", "clothing": CLOTHING, "small": CLOTHING, "held": CLOTHING}

# Keys end in a running number (tiles) or in hexadecimal digits of chance (clothing), so the last one picks a share of every class.
PRETRAIN = {"eurosat": "train/*[01].jpg", "clothing": "train/*", "small": "train/*", "held": "train/*[4-9a-f].jpg"}
IMAGES = {"eurosat": 1986, "clothing": 1500, "small": 1500, "held": 1104}
# Choices are made on these; no student and no probe has been trained on them.
VALIDATION, HELD_OUT, TEST = "train/*2.jpg", "train/*[0-3].jpg", "test/*"
LABELLED = PRETRAIN
SMALL = "--size 64 --grid 8"
VIEWS = {"eurosat": SMALL, "clothing": "--size 224 --grid 14", "small": SMALL, "held": SMALL}
TEACHER_SIZE = {"eurosat": 128, "clothing": 224, "small": 128, "held": 128}
BATCH, EPOCHS = 64, 20

# name: (data, views, options, cache it grows from)
CACHES: dict[str, tuple[str, int, str, str]] = {
    "eurosat-k1": ("eurosat", 1, "", ""),
    "eurosat-k2": ("eurosat", 2, "", "eurosat-k1"),
    "eurosat-k4": ("eurosat", 4, "", "eurosat-k2"),
    # A crop per epoch for the teacher in the step; the column of a tiny random network is there because a cache needs one.
    "eurosat-crops": ("eurosat", EPOCHS, "--teacher tiny=timm:test_vit/random", ""),
    "eurosat-fp16": ("eurosat", 1, "--dtype float16", ""),
    "eurosat-blocks": ("eurosat", 1, "--token-layout blocks", ""),
    "clothing-k1": ("clothing", 1, "", ""),
    "clothing-dino": ("clothing", 1, DINO, ""),
    "small-k1": ("small", 1, f"{DINO} --teacher {TEACHER.format(size=128)}", ""),
    "small-taps": ("small", 1, TAPS, ""),
    "held-k1": ("held", 1, f"{DINO} --teacher {TEACHER.format(size=128)}", ""),
    "held-taps": ("held", 1, TAPS, ""),
    "eurosat-dino": ("eurosat", 1, DINO, ""),
    "eurosat-taps": ("eurosat", 1, TAPS, ""),
    "both-k1": ("eurosat", 1, BOTH, ""),
    "both-k4": ("eurosat", 4, BOTH, "both-k1"),
    **{
        f"gal-{dtype}": ("eurosat", 1, f"--teacher {GALILEO} --dtype {dtype}", "")
        for dtype in ("int8", "pq4", "pq", "pq16")
    },
    **{
        name: made
        for dtype in ("int8", "pq4", "pq")
        for name, made in {
            f"cnn-{dtype}": ("eurosat", 1, f"--teacher {TEACHER.format(size=128)} --dtype {dtype}", ""),
            f"dino-{dtype}": ("small", 1, f"{DINO} --dtype {dtype}", ""),
        }.items()
    },
    "both-blocks": ("eurosat", 1, f"{BOTH} --token-layout blocks", ""),
    "both-blocks-k4": ("eurosat", 4, f"{BOTH} --token-layout blocks", "both-blocks"),
}

TRAINING = (
    "--student test_vit --set student.decoder.depth=1 --set student.decoder.width=64 --set student.decoder.heads=2 "
    f"--batch-size {BATCH} --blr 4e-3 --precision fp32 --workers 1 --panels-every 0 --keep 30"
)
PROBING = "--set knn.k=10 --set attentive.blrs=[10.0] --batch-size 64 --workers 1 --precision fp32"
FINETUNING = (
    "--set finetune.epochs=12 --set finetune.batch_size=64 --set finetune.blr=4e-3 --set finetune.warmup_epochs=2 "
    "--set finetune.drop_path=0 --set finetune.mixup=0 --set finetune.cutmix=0 --set finetune.erase=0 "
    "--set finetune.auto_augment='' --set finetune.crop_scale=[0.5,1.0] --batch-size 64 --workers 1 --precision fp32"
)
RECIPES = ("mae", "mr-mae", "mimic-only", "mimic-masked")


def arm(name: str, part: str, recipe: str, options: str = "", **others: Any) -> Arm:
    """One student: what is trained on which cache, and how it is probed.

    curve: epochs whose checkpoint is probed by k-NN. source: what is probed instead of a student of its own. test: keys of the images it is tested on. against: what it is compared with, named without seed.
    """
    usual = {"seed": 0, "cache": "eurosat-k1", "epochs": EPOCHS, "curve": (), "probes": ("knn", "linear"), "test": TEST,
             "against": ""}  # fmt: skip
    return {"name": name, "part": part, "recipe": recipe, "options": options, "source": "", **usual, **others}


def part_1(seed: int) -> list[Arm]:
    how: dict[str, Any] = {
        "seed": seed,
        "curve": () if seed else (1, 2, 5, 10),
        "probes": ("knn", "linear", "attentive"),
    }
    return [arm(f"{recipe}-s{seed}", "1", recipe, **how) for recipe in RECIPES]


def finetuned(of: str) -> Arm:
    """A trained student, fine-tuned: nothing is pre-trained again."""
    return arm(f"{of}-finetuned", "1", "", source=f"WORK/{of}", probes=("finetune",))


def chosen(name: str, part: str, recipe: str = "mr-mae", options: str = "", **others: Any) -> Arm:
    """An arm of the parts on two teachers, tested on the validation tiles."""
    return arm(name, part, recipe, options, **{"cache": "both-k1", "test": VALIDATION, **others})


def target(transform: str, teachers: str = "both", seed: int = 0) -> Arm:
    """`mr-mae` with another target transform, from Galileo, MobileNetV2 or both."""
    named = "" if teachers == "both" else f"--set terms.mimic.teachers=[{teachers}] "
    name, options = f"{teachers}-{transform.replace('+', '-')}", f"{named}--set terms.mimic.transform={transform}"
    return chosen(f"{name}-s{seed}", "targets", options=options, seed=seed, against=f"{teachers}-ln0")


def pair(name: str, recipe: str = "mr-mae", seed: int = 0, **others: Any) -> list[Arm]:
    """The usual and centred targets under another recipe, number of views or length."""
    return [chosen(f"{name}-{transform}-s{seed}", "others", recipe, f"--set terms.mimic.transform={transform}", against=f"{name}-ln0", seed=seed, **others)
            for transform in ("ln0", "position")]  # fmt: skip


def decoder(depth: int, kind: str, predicted: int, seed: int = 0, width: int = 64) -> Arm:
    """`mr-mae` on centred targets with another pixel branch: blocks of the decoder, what they attend to, patches of 48 that they predict."""
    blocks, narrow = (
        (f"{depth}", "")
        if width == 64
        else (f"{depth}x{width}", f" --set student.decoder.width={width} --set student.decoder.heads=1")
    )
    some = "" if predicted == 48 else f" --set mask.n_predict={predicted} --set mask.predict=uniform"
    options = f"{CENTRED} --set student.decoder.depth={depth} --set student.decoder.kind={kind}{narrow}{some}"
    name = f"decoder-{blocks}-{kind}-{predicted}-s{seed}"
    return chosen(name, "decoder", options=options, seed=seed, against="decoder-4-self-48")


def blocks(views: int, seed: int) -> Arm:
    """`mr-mae` on centred targets that shows stored token blocks."""
    cache, against = (
        ("both-blocks", "both-position") if views == 1 else (f"both-blocks-k{views}", f"views-{views}-position")
    )
    options = f"{CENTRED} --set mask.sampler=stored_block"
    return chosen(f"blocks-k{views}-s{seed}", "blocks", options=options, cache=cache, seed=seed, against=against)


def tested(of: str, against: str) -> Arm:
    """A student that was chosen on the validation tiles, probed on the test part."""
    how: dict[str, Any] = {"seed": int(of[-1]), "probes": ("knn", "linear", "attentive"), "against": f"{against}-test"}
    return arm(f"{of}-test", "tested", "", source=f"WORK/{of}", cache="both-k1", **how)


def codes(dtype: str, seed: int, teacher: str = "gal") -> Arm:
    """`mr-mae` from a cache of this dtype, tested on the test part: on centred targets of Galileo, or at the better rate on `ln0` of another teacher."""
    how: dict[str, Any] = {
        "seed": seed,
        "cache": f"{teacher}-{dtype}",
        "test": TEST,
        "probes": ("knn", "linear", "attentive"),
    }
    if teacher == "gal":
        return chosen(f"codes-{dtype}-s{seed}", "codes", options=CENTRED, against="codes-int8", **how)
    others: dict[str, Any] = {"epochs": 2 * EPOCHS if teacher == "dino" else EPOCHS, "against": f"codes-{teacher}-int8"}
    return chosen(f"codes-{teacher}-{dtype}-s{seed}", "codes", options="--blr 12e-3", **others, **how)


def photos(transform: str, seed: int, teacher: str = "") -> Arm:
    """`mr-mae` on the photographs with another target transform, from both teachers there or one."""
    named = f" --set terms.mimic.teachers=[{teacher}]" if teacher else ""
    label = f"photos-{teacher}" if teacher else "photos"
    how: dict[str, Any] = {
        "seed": seed,
        "cache": "small-k1",
        "epochs": 2 * EPOCHS,
        "test": TEST,
        "against": f"{label}-ln0",
    }
    return chosen(
        f"{label}-{transform.replace('+', '-')}-s{seed}",
        "others",
        options=f"--set terms.mimic.transform={transform}{named}",
        **how,
    )


def held(setting: str, transform: str, seed: int) -> Arm:
    """Photographs with a validation part: trained on 1,104 for as many updates as forty epochs of all, tested on the other 396."""
    recipe, options = SETTINGS[setting]
    cache, epochs = "held-taps" if recipe == "maskalign" else "held-k1", 54
    options = f"{options.format(transform=transform)} --blr 12e-3"
    return arm(f"held-{setting}-{transform.replace('+', '-')}-s{seed}", "held", recipe, options, cache=cache, epochs=epochs,
               seed=seed, test=HELD_OUT, against=f"held-{setting.removesuffix('-weight-13')}-ln0")  # fmt: skip


def held_tested(of: str, against: str) -> Arm:
    """A student of the photographs that was chosen on the validation part, probed on the test part."""
    return tested(of, against) | {"part": "held tested", "cache": "held-k1", "epochs": 54}


def optimiser(name: str, blr: str, seed: int = 0, transform: str = "position") -> Arm:
    """`mr-mae` on centred targets (or others) with another optimiser, or AdamW at another rate than the study's."""
    options = f"--set terms.mimic.transform={transform} --set optim.name={name} --blr {blr}"
    label, against = (
        (f"{name}-{blr}", "both-position")
        if transform == "position"
        else (f"{name}-{blr}-{transform}", f"{name}-{blr}")
    )
    if name != "adamw" and blr in ("12e-3", "36e-3", "108e-3", "324e-3"):
        against = f"adamw-{blr}"
    if (name, blr) == ("schedule-free", "108e-3"):
        against = "adamw-36e-3"  # each at its best rate
    return chosen(f"{label}-s{seed}", "optimiser", options=options, seed=seed, against=against)


def fast(of: Arm) -> Arm:
    """The same arm at three times the study's rate, which is the better one; so is what it is compared with."""
    against = {"both-position": "adamw-12e-3", "both-ln0": "adamw-12e-3-ln0"}.get(
        of["against"], f"fast-{of['against']}"
    )
    others = {"name": f"fast-{of['name']}", "part": f"fast {of['part']}", "options": f"{of['options']} --blr 12e-3"}
    return of | others | {"against": against}


def probed_more(of: str, against: str) -> Arm:
    """A student that is there, by the probes that cost more than it did: attentive, and segmentation of mosaics."""
    how: dict[str, Any] = {"seed": int(of[-1]), "probes": ("attentive", "segment"), "against": f"{against}-more"}
    return chosen(f"{of}-more", "more", "", source=f"WORK/{of}", **how)


def attended(name: str, recipe: str = "mr-mae", options: str = "", seed: int = 0) -> Arm:
    """A student of a teacher with attention, on photographs."""
    how: dict[str, Any] = {"cache": "clothing-dino", "epochs": 8, "seed": seed, "against": "attention-none"}
    return arm(f"attention-{name}-s{seed}", "attention", recipe, options, **how)


CENTRED = "--set terms.mimic.transform=position"
MIMIC, FROM_DINO = "--set terms.mimic.transform={transform}", "--set terms.mimic.teachers=[dino]"
HEAVY = "--set terms.mimic.weight=13"
# Other recipes and teachers on one data set: name, recipe, options.
SETTINGS = {
    "both": ("mr-mae", MIMIC),
    "cnn": ("mr-mae", f"{MIMIC} --set terms.mimic.teachers=[cnn]"),
    "dino": ("mr-mae", f"{MIMIC} {FROM_DINO}"),
    "both-weight-13": ("mr-mae", f"{MIMIC} {HEAVY}"),
    "cnn-weight-13": ("mr-mae", f"{MIMIC} --set terms.mimic.teachers=[cnn] {HEAVY}"),
    "dino-weight-13": ("mr-mae", f"{MIMIC} {FROM_DINO} {HEAVY}"),
    "mimic-only": ("mimic-only", MIMIC),
    "mimic-masked": ("mimic-masked", MIMIC),
    "fd": ("fd", "--set terms.distil.transform={transform} --set terms.distil.teachers=[dino] --set terms.distil.positions=all --set terms.distil.teacher_tap=pre_tail"),
    "cls": ("mr-mae-cls", f"{MIMIC} {FROM_DINO} --set terms.cls.teachers=[dino]"),
    "maskalign": ("maskalign", "--student vit_tiny_patch16_224 " + " ".join(f"--set terms.layer{i}.transform={{transform}}" for i in range(8, 13))),
}  # fmt: skip
TRANSFORMS = ("none", "channel", "position+ln0", "position+phi_s")
CHOICES: list[Arm] = [
    *(target(transform, teachers) for teachers in ("both", "gal", "cnn") for transform in ("ln0", "position")),
    *(target(transform) for transform in TRANSFORMS),
    *(target(transform, seed=seed) for seed in (1, 2) for transform in ("ln0", "position")),
    *pair("mimic-only", "mimic-only"),
    *(decoder(*how) for how in ((4, "self", 48), (1, "self", 16), (1, "cross", 16), (2, "self", 16), (4, "cross", 48))),
    *(target(transform, "gal", seed) for seed in (1, 2) for transform in ("ln0", "position")),
    *(target(transform, "cnn", seed) for seed in (1, 2) for transform in ("ln0", "position")),
    *(target("position+ln0", teachers, seed) for seed in (1, 2) for teachers in ("cnn", "both", "gal")),
    *pair("views-4", cache="both-k4"),
    *pair("longer", epochs=2 * EPOCHS),
    *pair("mimic-masked", "mimic-masked"),
    *(decoder(*how, seed) for seed in (1, 2) for how in ((4, "self", 48), (1, "self", 16), (1, "cross", 16))),
    *(blocks(views, seed) for views in (1, 4) for seed in range(3)),
    *(target(transform, teachers) for teachers in ("gal", "cnn") for transform in TRANSFORMS),
    *(decoder(*how) for how in ((8, "self", 48), (2, "self", 48), (4, "self", 16), (2, "cross", 16), (1, "self", 32), (1, "cross", 48))),
    *(decoder(1, "self", 16, seed, width=32) for seed in range(3)),
    *(optimiser(*how) for how in (("muon", "4e-3"), ("muon", "12e-3"), ("adamw", "12e-3"), ("muon", "1.3e-3"))),
    *(optimiser("adamw", "12e-3", seed, "ln0") for seed in range(3)),
    *(optimiser(*how, seed) for seed in (1, 2) for how in (("muon", "4e-3"), ("muon", "12e-3"), ("adamw", "12e-3"))),
    *(optimiser(name, blr, seed) for blr in ("36e-3", "108e-3") for seed in range(3) for name in ("adamw", "muon")),
    *(optimiser(name, "324e-3") for name in ("adamw", "muon")),
    *(optimiser("schedule-free", blr) for blr in ("12e-3", "36e-3", "108e-3", "324e-3")),
    *(optimiser("schedule-free", "108e-3", seed) for seed in (1, 2)),
    *(tested(f"{teachers}-{t}-s{seed}", f"{teachers}-ln0") for teachers in ("both", "gal", "cnn") for seed in range(3)
      for t in ("ln0", "position", "position-ln0")),
]  # fmt: skip


SEEDS = range(3)
FAST: list[Arm] = [fast(arm) for arm in (
    *(decoder(*how, seed) for seed in SEEDS for how in ((4, "self", 48), (2, "self", 16), (1, "self", 16), (1, "cross", 16))),
    *(blocks(1, seed) for seed in SEEDS),
    *(each for seed in SEEDS for each in (*pair("views-4", cache="both-k4", seed=seed), blocks(4, seed))),
    *(target(transform, seed=seed) for seed in SEEDS for transform in ("none", "channel", "position+ln0")),
    *(each for recipe in ("mimic-only", "mimic-masked") for seed in SEEDS for each in pair(recipe, recipe, seed=seed)),
    *(target("position+phi_s", seed=seed) for seed in SEEDS),
    *(decoder(*how, 0) for how in ((4, "cross", 48), (2, "cross", 16), (4, "self", 16), (2, "self", 48))),
    *(target(transform, teachers, seed) for teachers in ("gal", "cnn") for seed in SEEDS for transform in ("ln0", "position")),
)]  # fmt: skip


FAST += [fast(arm) for arm in (
    *(each for seed in SEEDS for each in pair("photos", seed=seed, cache="small-k1", epochs=2 * EPOCHS, test=TEST)),
    *(photos(transform, seed) for transform in ("position+ln0", "channel") for seed in SEEDS),
    *(each | {"options": f"{each['options']} --set terms.mimic.teachers=[{teacher}]"} for seed in SEEDS for teacher in ("cnn", "dino")
      for each in pair(f"photos-{teacher}", seed=seed, cache="small-k1", epochs=2 * EPOCHS, test=TEST)),
    *(each | {"options": f"{each['options']} --set terms.mimic.teachers=[dino] --set terms.cls.teachers=[dino]"} for seed in SEEDS
      for each in pair("photos-cls", "mr-mae-cls", seed=seed, cache="small-k1", epochs=2 * EPOCHS, test=TEST)),
    *(each | {"options": each["options"].replace("mimic", "distil") + " --set terms.distil.teachers=[gal] --set terms.distil.positions=all --set terms.distil.teacher_tap=pre_tail"}
      for seed in SEEDS for each in pair("fd", "fd", seed=seed)),
    *(each | {"options": "--student vit_tiny_patch16_224 " + " ".join(
        each["options"].replace("mimic", f"layer{i}") for i in range(8, 13))} for seed in SEEDS
      for each in pair("maskalign", "maskalign", seed=seed, cache="small-taps", test=TEST)),
    *pair("epochs-100", epochs=5 * EPOCHS),
    *(each | {"options": f"--student vit_tiny_patch16_224 {each['options']}"} for each in pair("vit-tiny")),
)]  # fmt: skip
FAST += [fast(arm) for arm in (
    *(target(transform, teacher, seed) for transform in TRANSFORMS for teacher in ("gal", "cnn") for seed in SEEDS),
    *(photos(transform, seed) for transform in ("none", "position+phi_s") for seed in SEEDS),
    *(photos(transform, seed, teacher) for transform in TRANSFORMS for teacher in ("cnn", "dino") for seed in SEEDS),
    *(each | {"options": f"--student vit_tiny_patch16_224 {each['options']}"} for seed in (1, 2) for each in pair("vit-tiny", seed=seed)),
    *(each for seed in (1, 2) for each in pair("epochs-100", epochs=5 * EPOCHS, seed=seed)),
)]  # fmt: skip
FAST = [each | {"part": "fast photos"} if each["cache"].startswith("small") else each for each in FAST]
FAST += [  # raw values weigh this teacher 13 times as much against the pixels: is it that?
    each | {"name": each["name"].replace("-s", "-weight-13-s"), "options": f"{each['options']} --set terms.mimic.weight=13"}
    for transform in ("ln0", "channel", "position") for seed in SEEDS for each in [fast(photos(transform, seed, "cnn")) | {"part": "fast photos"}]
]  # fmt: skip
HELD: list[Arm] = [held(*how) for how in (
    *((teacher, transform, seed) for seed in SEEDS for transform in ("ln0", "position", *TRANSFORMS) for teacher in ("both", "cnn", "dino")),
    *((f"{teacher}-weight-13", transform, seed) for teacher in ("cnn", "both", "dino") for seed in SEEDS for transform in ("ln0", "position", "channel")),
    *((setting, transform, seed) for setting in ("mimic-only", "mimic-masked", "fd", "cls", "maskalign")
      for seed in SEEDS for transform in ("ln0", "position")),
)]  # fmt: skip
HELD += [
    held_tested(f"held-{setting}-{transform}-s{seed}", f"held-{setting.removesuffix('-weight-13')}-ln0")
    for setting in ("both", "cnn", "dino", "both-weight-13", "cnn-weight-13", "dino-weight-13")
    for transform in ("ln0", "position", "none", "channel")
    for seed in SEEDS
    if transform != "none" or "weight" not in setting
]
FAST += [fast(each | {"options": f"{SETTINGS[setting][1].format(transform=transform)}"})
    for setting, cache, epochs in (("cls", "eurosat-dino", EPOCHS), ("maskalign", "eurosat-taps", EPOCHS // 2)) for seed in SEEDS
    for each, transform in zip(pair(f"tiles-{setting}", SETTINGS[setting][0], cache=cache, seed=seed, epochs=epochs), ("ln0", "position"))]  # fmt: skip
FAST += [fast(decoder(1, "self", 16, seed, width)) for width in (48, 32) for seed in SEEDS]
FAST += [probed_more(arm["name"], "fast-decoder-4-self-48") for arm in FAST if arm["part"] == "fast decoder"]
FAST += [probed_more(f"fast-mimic-only-position-s{seed}", "fast-decoder-4-self-48") for seed in SEEDS]


# In the order of their worth: whatever has run when time is up can be reported.
ARMS: list[Arm] = [
    *part_1(0),
    arm("untrained-s0", "1", "mr-mae", "--blr 1e-12", epochs=1, probes=("knn", "linear", "attentive")),
    arm("views-2", "3", "mr-mae", cache="eurosat-k2"),
    arm("views-4", "3", "mr-mae", cache="eurosat-k4"),
    *part_1(1),
    *part_1(2),
    arm("online", "3", "mr-mae", f"--online --teacher {TEACHER.format(size=128)}", cache="eurosat-crops"),
    arm("focused", "2", "mr-mae-focused", "--set mask.source=norm"),
    arm("teacher", "1", "", source=TEACHER.format(size=128).removeprefix("cnn="), epochs=0),
    *(finetuned(f"{recipe}-s0") for recipe in (*RECIPES, "untrained")),
    arm("weight-0.1", "4", "mr-mae", "--set terms.mimic.weight=0.1"),
    arm("weight-10", "4", "mr-mae", "--set terms.mimic.weight=10"),
    arm("target-none", "4", "mr-mae", "--set terms.mimic.transform=none"),
    arm("target-l2", "4", "mr-mae", "--set terms.mimic.transform=l2 --set terms.mimic.distance=2-2cos"),
    arm("target-channel", "4", "mr-mae", "--set terms.mimic.transform=channel"),
    arm("mr-mae-half", "1", "mr-mae", epochs=EPOCHS // 2),
    arm("mae-longer", "1", "mae", epochs=30),
    arm("float16", "3", "mr-mae", cache="eurosat-fp16"),
    arm("blocks", "3", "mr-mae", "--set mask.sampler=stored_block", cache="eurosat-blocks"),
    *(arm(f"clothing-{recipe}", "clothing", recipe, cache="clothing-k1", epochs=8) for recipe in RECIPES),
    arm("weight-0.3", "4", "mr-mae", "--set terms.mimic.weight=0.3"),
    arm("weight-3", "4", "mr-mae", "--set terms.mimic.weight=3"),
    *CHOICES,
    *FAST,
    *HELD,
    *(codes(dtype, seed) for seed in range(3) for dtype in ("int8", "pq")),
    *(codes(dtype, seed) for seed in range(3) for dtype in ("pq16", "pq4")),
    *(
        codes(dtype, seed, teacher)
        for seed in range(3)
        for dtype in ("int8", "pq", "pq4")
        for teacher in ("cnn", "dino")
    ),
    attended("none"),
    attended("sampled", "mr-mae-focused"),
    attended("weighed", options="--set terms.mimic.focus=true"),
]


def data_of(arm: Arm) -> str:
    return CACHES[arm["cache"]][0]


def extraction(cache: str) -> list[str]:
    """The command that makes (or grows) a cache."""
    data, views, options, _ = CACHES[cache]
    teacher = [] if "--teacher" in options else ["--teacher", TEACHER.format(size=TEACHER_SIZE[data])]
    return ["extract-features", PHOTOS[data], f"WORK/caches/{cache}", "--include", PRETRAIN[data], *VIEWS[data].split(),
            "--views", str(views), *teacher, "--workers", "1", *options.split()]  # fmt: skip


def training(arm: Arm) -> list[str]:
    """The command that trains an arm's student; the same again continues."""
    if not arm["recipe"]:
        return []
    return ["train-mrmae", f"WORK/caches/{arm['cache']}", f"WORK/{arm['name']}", "--recipe", arm["recipe"], "--seed", str(arm["seed"]),
            "--epochs", str(arm["epochs"]), *TRAINING.split(), *arm["options"].split()]  # fmt: skip


def probings(arm: Arm) -> Iterator[tuple[int, Sequence[str], list[str]]]:
    """(epoch, probes, command) of everything that is measured on an arm's student."""
    data, student = data_of(arm), arm["source"] or f"WORK/{arm['name']}"
    out = f"WORK/{arm['name']}/probes"
    updates = IMAGES[data] // BATCH
    tests = [] if arm["test"] == TEST else ["--test-include", arm["test"]]
    for epoch in arm["curve"]:
        checkpoint = f"{student}/checkpoints/step-{epoch * updates:09d}.pt"
        yield epoch, ("knn",), probing(checkpoint, data, out, ("knn",), [*tests, *PROBING.split()])
    settings = FINETUNING if "finetune" in arm["probes"] else PROBING
    yield arm["epochs"], arm["probes"], probing(student, data, out, arm["probes"], [*tests, *settings.split()])


def probing(source: str, data: str, out: str, probes: Sequence[str], settings: Sequence[str]) -> list[str]:
    named = [word for probe in probes for word in ("--probe", probe)]
    return ["probe-features", source, PHOTOS[data], "--out", out, "--train-include", LABELLED[data], *named, *settings]


def commands(arm: Arm) -> list[list[str]]:
    """All commands of an arm, its caches apart."""
    return [*filter(None, [training(arm)]), *(command for _, _, command in probings(arm))]
