"""What goes over the wire, by resource. `/…` strings are paths of this service. Imports no tables."""
