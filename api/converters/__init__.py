"""From rows to what goes over the wire, by resource."""
