"""The fast form: chunks of tokens as matrix products, forward and backward by hand."""
