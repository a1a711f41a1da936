"""Does the model see, and how well."""
