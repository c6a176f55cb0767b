"""The training program, the kinds of training, and the data and folder of a run."""
