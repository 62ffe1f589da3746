"""`probe-features SOURCE DATA`: how good are the features. The same command again prints what was found."""

from pathlib import Path
from typing import Any

import click

from mrmae.common.errors import in_one_line
from mrmae.common.suggest import Command
from mrmae.probe.settings import PROBES


@click.command(
    cls=Command,
    context_settings={"show_default": True, "max_content_width": 110, "help_option_names": ["-h", "--help"]},
)
@click.argument("words", nargs=-1, required=True, metavar="SOURCE... [DATA [TEST]]")
@click.option("--data", multiple=True, metavar="DATA",
              help="The images, when several SOURCES are to be compared; twice: the train and the test part.")  # fmt: skip
@click.option("--compare", is_flag=True,
              help="Put SOURCES in one table, also a single one beside bare pixels: DATA --compare RUN RUN, or RUN RUN --data DATA.")  # fmt: skip
@click.option(
    "--probe", "probes", multiple=True, type=click.Choice(PROBES), default=("knn",), help="What to do; repeatable."
)
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a probe's setting, e.g. knn.k=10; repeatable."
)
@click.option("--train-include", multiple=True, metavar="PATTERN", help="Keys of the train part. [default: train/*]")
@click.option("--test-include", multiple=True, metavar="PATTERN", help="Keys of the test part. [default: test/*]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Features and results. [default: OUT/probes of a run, else probes/NAME]",
)
@click.option("--size", type=click.IntRange(0), default=0, help="Input size in pixels; 0 is the model's own.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of starts, orders, held-out images and intervals.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    help="Of the features. [auto: fp16 on a GPU]",
)
@click.option(
    "--batch-size", type=click.IntRange(0), default=0, help="Images per forward pass. [0: 64 on a GPU, else 8]"
)
@click.option("--workers", type=click.IntRange(0), default=0, help="Decoding threads. [0: all cores]")
@click.option("--baselines/--no-baselines", default=True,
              help="Whether a comparison also has bare pixels and untrained weights.")  # fmt: skip
@click.option("--allow-partial", is_flag=True, help="Probe on what is committed of an unfinished cache.")
@click.option("--local-cache", type=click.Path(path_type=Path), metavar="DIR",
              help="Keep whole shards of a cache that is far away in this folder on a near disk.")  # fmt: skip
@click.option(
    "--local-cache-bytes", metavar="N", help="At most so much there, e.g. 200GB; the least recently used go first."
)
@click.option("--allow-shared", is_flag=True, help="Also test on images the student was pre-trained on.")
def main(
    words: tuple[str, ...], data: tuple[str, ...], compare: bool, probes: tuple[str, ...], sets: tuple[str, ...], baselines: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Probe the features of SOURCE on the labelled images of DATA; several with --data or --compare: compare them.

    SOURCE: OUT of train-mrmae, OUT/student, a checkpoint, timm:NAME[@FILE][?key=value],
    open_clip:NAME[/TAG][@FILE][?key=value], CACHE#TEACHER[.TAP], `pixels`, or
    untrained:SOURCE. DATA: a folder or tar (also at s3://, gs://, az://) with train/CLASS and test/CLASS, a train and a test path, or a cache (its stored views).
    Features are computed once and kept; results are in OUT/results (JSON) and OUT/results.md. A comparison has a row per source,
    pixels alone and untrained weights beside them, and paired intervals of their differences.
    """
    from mrmae.common.backend import Unreachable
    from mrmae.common.device import keep_memory
    from mrmae.probe.compare import compare_sources, sources_and_data
    from mrmae.probe.job import ProbeOptions
    from mrmae.probe.run import probe_features  # torch takes seconds to import: --help need not wait
    from mrmae.probe.settings import settings_from

    keep_memory(options["device"])
    try:
        sources, data = sources_and_data(words, data, compare=compare)
        chosen = ProbeOptions(sources[0], data, probes, settings_from(sets), **options)
        if len(sources) == 1 and not compare:
            probe_features(chosen, say=click.echo)
        else:
            compare_sources(sources, chosen, baselines=baselines, say=click.echo)
    except (ValueError, OSError, Unreachable) as error:
        raise click.ClickException(in_one_line(error)) from error


if __name__ == "__main__":
    main()
