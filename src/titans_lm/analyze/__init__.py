"""What a memory did with a text: traces, probes, attributions, figures, and a page that shows them."""
