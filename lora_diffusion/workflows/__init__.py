"""Whole commands. They wire objects together and decide nothing; start reading at `training_run.train`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_diffusion.workflows.adapter_files import export as export
    from lora_diffusion.workflows.answering import ask as ask
    from lora_diffusion.workflows.answering import examine as examine
    from lora_diffusion.workflows.captioning import Captions as Captions
    from lora_diffusion.workflows.captioning import caption as caption
    from lora_diffusion.workflows.checkpoints import ExtractResult as ExtractResult
    from lora_diffusion.workflows.checkpoints import MergeResult as MergeResult
    from lora_diffusion.workflows.checkpoints import extract as extract
    from lora_diffusion.workflows.checkpoints import find_model as find_model
    from lora_diffusion.workflows.checkpoints import find_weights as find_weights
    from lora_diffusion.workflows.checkpoints import merge as merge
    from lora_diffusion.workflows.comparison import compare as compare
    from lora_diffusion.workflows.composition import Composition as Composition
    from lora_diffusion.workflows.composition import compose as compose
    from lora_diffusion.workflows.composition import resize as resize
    from lora_diffusion.workflows.config_check import check_config as check_config
    from lora_diffusion.workflows.conversion import Conversion as Conversion
    from lora_diffusion.workflows.conversion import convert as convert
    from lora_diffusion.workflows.data_check import check_data as check_data
    from lora_diffusion.workflows.estimation import Estimate as Estimate
    from lora_diffusion.workflows.estimation import estimate as estimate
    from lora_diffusion.workflows.evaluation import Question as Question
    from lora_diffusion.workflows.evaluation import evaluate as evaluate
    from lora_diffusion.workflows.evaluation import evaluate_as_table as evaluate_as_table
    from lora_diffusion.workflows.evaluation import failed_gates as failed_gates
    from lora_diffusion.workflows.inspection import inspect as inspect
    from lora_diffusion.workflows.metadata_texts import edit_metadata as edit_metadata
    from lora_diffusion.workflows.metadata_texts import metadata_lines as metadata_lines
    from lora_diffusion.workflows.metadata_texts import show_metadata as show_metadata
    from lora_diffusion.workflows.metadata_texts import strip_metadata as strip_metadata
    from lora_diffusion.workflows.outlook import Outlook as Outlook
    from lora_diffusion.workflows.outlook import dry_run as dry_run
    from lora_diffusion.workflows.pictures import Pictures as Pictures
    from lora_diffusion.workflows.pictures import generate as generate
    from lora_diffusion.workflows.publishing import Publication as Publication
    from lora_diffusion.workflows.publishing import push as push
    from lora_diffusion.workflows.reports import read_training as read_training
    from lora_diffusion.workflows.reports import report as report
    from lora_diffusion.workflows.selection import Preference as Preference
    from lora_diffusion.workflows.selection import Selection as Selection
    from lora_diffusion.workflows.selection import select as select
    from lora_diffusion.workflows.subtitles import write_transcripts as write_transcripts
    from lora_diffusion.workflows.training_run import TrainResult as TrainResult
    from lora_diffusion.workflows.training_run import train as train
    from lora_diffusion.workflows.transcription import transcribe as transcribe
    from lora_diffusion.workflows.transcription import understand as understand
    from lora_diffusion.workflows.verification import Verification as Verification
    from lora_diffusion.workflows.verification import verify as verify

_HOMES = {
    "adapter_files": ("export",),
    "answering": ("ask", "examine"),
    "captioning": ("Captions", "caption"),
    "data_check": ("check_data",),
    "checkpoints": ("ExtractResult", "MergeResult", "extract", "find_model", "find_weights", "merge"),
    "comparison": ("compare",),
    "config_check": ("check_config",),
    "composition": ("Composition", "compose", "resize"),
    "conversion": ("Conversion", "convert"),
    "estimation": ("Estimate", "estimate"),
    "evaluation": ("Question", "evaluate", "evaluate_as_table", "failed_gates"),
    "metadata_texts": ("edit_metadata", "metadata_lines", "show_metadata", "strip_metadata"),
    "inspection": ("inspect",),
    "outlook": ("Outlook", "dry_run"),
    "pictures": ("Pictures", "generate"),
    "publishing": ("Publication", "push"),
    "reports": ("read_training", "report"),
    "selection": ("Preference", "Selection", "select"),
    "subtitles": ("write_transcripts",),
    "training_run": ("TrainResult", "train"),
    "transcription": ("transcribe", "understand"),
    "verification": ("Verification", "verify"),
}
"""File -> what it offers. Imported when it is asked for, so that work on files does not wait for diffusers."""


def __getattr__(name: str) -> Any:
    for home, offered in _HOMES.items():
        if name in offered:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
