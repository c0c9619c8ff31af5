"""What the functions of a user must keep to, and how it is seen that they do."""
