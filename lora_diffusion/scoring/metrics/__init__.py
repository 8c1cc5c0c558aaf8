"""Scores of images and of answers, one object METRIC in each file; see core.protocols.Metric.

Another package brings one through the entry-point group `lora_diffusion.metrics`, say a model of what people prefer:

    [project.entry-points."lora_diffusion.metrics"]
    pick_score = "my_package.pick_score:METRIC"

Its `score` gets the images as paths; `evidence.scorers.names` holds what `--scorer KEY=VALUE` gave for its models.
"""
