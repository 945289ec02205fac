"""`make demo`: an online D-Fusion run through the REST API, with its results as a table and images."""
