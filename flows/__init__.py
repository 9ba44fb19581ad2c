"""The flows: the DAG of each kind of run. A flow reads like the text that describes it; it only calls tasks."""
