"""The DAG. A flow reads like the paragraph that describes it; no subprocess and no parsing here."""
