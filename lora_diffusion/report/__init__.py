"""The pages that show a run or an evaluation."""
