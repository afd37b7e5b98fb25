"""SPO, step-aware preference optimisation: the online method and its preference model."""
