"""The zoo's weights on a GPU that is lent for a limited time, in a few commands of some minutes each."""
