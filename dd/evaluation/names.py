"""What commands and results call things; importing it costs nothing."""

#: What a run found, in its folder.
RESULTS = "results.json"
#: What networks are trained on, in the order of the table.
TRAINING_SETS = ("random_real", "distilled", "full_data")
#: What the tensors of a set are that others made: pixels in [0, 1], or already transformed.
PIXELS, TRANSFORMED = "pixels", "transformed"
