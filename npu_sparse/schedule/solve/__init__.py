"""Rows of a schedule by integer programs: Farkas' lemma, costs, fusion, and why a request has no answer."""
