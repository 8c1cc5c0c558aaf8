"""What goes on beside the steps of a training run where it takes evaluation or file checks; one hook each."""
