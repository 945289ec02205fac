"""Request and response models, by resource. Strings such as `/…` are paths of this service. Imports no tables."""
