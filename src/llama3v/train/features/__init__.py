"""Where training gets the features of its images from: one file for each mode behind one interface, `FeatureSource`."""
