"""The synthetic set: its images and labels, and what is learned of them."""
