"""Scores of generated pictures, and the report that shows them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def evaluate(model: Any = None, **question: Any) -> "pd.DataFrame":
    """Evaluates adapters against the base alone, and returns one line for each score.

        from lora_diffusion.evaluation import evaluate

        scores = evaluate(
            "builtin:emoji", adapters=["blorp.safetensors"], weights=[0.5, 1], prompts="emoji-style",
            references="references", output_path="evaluation",
        )
        scores.groupby(["candidate", "metric"]).value.mean()

    Args:
        model: the base, by its path or as options of its family; None takes that of `run`.
        question: fields of `lora_diffusion.workflows.evaluate.Question`.

    Raises:
        InputError: anything that the user can mend, all of it at once; raised before the base is loaded.
    """
    # The one way from a room to a workflow: this is where people look for it, and nothing in this room calls it.
    table: pd.DataFrame = import_module("lora_diffusion.workflows").evaluate_as_table(model, **question)
    return table
