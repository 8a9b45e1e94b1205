"""Quality metrics, comparisons and benchmarks; bundles are measured over the product's own frame path."""
