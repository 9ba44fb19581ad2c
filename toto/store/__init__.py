"""The store that machines fetch from: each has its own closures there, by HTTP or by NFS, and nothing else."""
