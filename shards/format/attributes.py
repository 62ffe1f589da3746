"""What a column's metadata say of it, in either format. docs/format.md, "Columns"."""

from typing import Any

from mrmae.shards.format.plan import Plan
from mrmae.shards.format.spec import FORMAT_VERSION, plain

VALUE = {
    "int8": "channel_mean + channel_std * scale[sample, patch] * tokens[sample, patch, channel]",
    "fp8": "channel_mean + channel_std * scale[sample, patch] * e4m3fn(tokens[sample, patch, channel])",
    "float16": "tokens[sample, patch, channel]",
}


def column_attributes(plan: Plan, view: int, column: str) -> dict[str, Any]:
    """A column's attributes: enough to dequantise without the rest of the cache."""
    layout = {} if plan.token_layout is None else {"token_layout": plain(plan.token_layout)}
    return {
        **layout,
        "format_version": FORMAT_VERSION,
        "column_id": plan.ids[column],
        "view": view,
        "teacher": plain(plan.teacher(column)),
        "quantiser": plan.quantisers[column].to_json(),
        "value": VALUE[plan.dtype],
    }
