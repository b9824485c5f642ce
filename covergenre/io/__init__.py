"""Local and S3 storage, Parquet files from untrusted sources, hashes of tables, URLs."""
