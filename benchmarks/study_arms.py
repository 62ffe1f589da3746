"""The arms of the study as data, and the product commands that each of them is.

`DATA/` stands for the data root and `WORK/` for the folder of caches and runs, until a command runs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

Arm = dict[str, Any]

# MobileNetV2's last stage of stride 16 at 128 px is an 8 x 8 map: the student's own grid, nothing is resampled.
TEACHER = "cnn=timm:mobilenetv2_100@DATA/../weights/mobilenetv2_100_imagenet1k.safetensors?pad_type=same&mean=0.5&std=0.5&interpolation=bilinear&input_size={size}&tap=stage_4"
PHOTOS = {"eurosat": "DATA/eurosat-rgb.tar", "clothing": "DATA/clothing-small.tar"}

# Keys end in a running number, so its last digit picks a share of every class.
PRETRAIN = {"eurosat": "train/*[01].jpg", "clothing": "train/*"}
IMAGES = {"eurosat": 1986, "clothing": 1500}
LABELLED = {"eurosat": "train/*[01].jpg", "clothing": "train/*"}
VIEWS = {"eurosat": "--size 64 --grid 8", "clothing": "--size 224 --grid 14"}
TEACHER_SIZE = {"eurosat": 128, "clothing": 224}
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

    curve: epochs whose checkpoint is probed by k-NN. source: what is probed instead of a student of its own.
    """
    usual = {"seed": 0, "cache": "eurosat-k1", "epochs": EPOCHS, "curve": (), "probes": ("knn", "linear")}
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
    for epoch in arm["curve"]:
        checkpoint = f"{student}/checkpoints/step-{epoch * updates:09d}.pt"
        yield epoch, ("knn",), probing(checkpoint, data, out, ("knn",), PROBING)
    settings = FINETUNING if "finetune" in arm["probes"] else PROBING
    yield arm["epochs"], arm["probes"], probing(student, data, out, arm["probes"], settings)


def probing(source: str, data: str, out: str, probes: Sequence[str], settings: str) -> list[str]:
    chosen = [word for probe in probes for word in ("--probe", probe)]
    return [
        "probe-features",
        source,
        PHOTOS[data],
        "--out",
        out,
        "--train-include",
        LABELLED[data],
        *chosen,
        *settings.split(),
    ]


def commands(arm: Arm) -> list[list[str]]:
    """All commands of an arm, its caches apart."""
    return [*filter(None, [training(arm)]), *(command for _, _, command in probings(arm))]
