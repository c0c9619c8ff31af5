"""What commands and results call things; importing it costs nothing."""

#: What a run found, in its folder.
RESULTS = "results.json"
#: What networks are trained on, in the order of the table.
TRAINING_SETS = ("random_real", "distilled", "full_data")
#: What the tensors of a set are that others made: pixels in [0, 1], or already transformed.
PIXELS, TRANSFORMED = "pixels", "transformed"
#: How real images can be chosen instead: at random; by the features of a network trained on all of
#: them, so that their mean follows that of all, or so that all are near one; the easiest by EL2N.
BASELINES = ("random", "herding", "k_center", "el2n")
#: Random images with the soft labels of a distilled set.
LABELS_ALONE = "random_with_the_distilled_labels"
#: The forms in which a set can be written.
EXPORT_FORMATS = ("safetensors", "pt", "npz", "folder", "datasets", "ddranking")
