"""Data sources: documents in files and datasets, the index of their windows, and the order of samples.

SOURCES is the registry of data formats: name -> "module:class" of a trainer.sources.base.Source. The first source
that matches a file or dataset opens it. A new format is one file with a Source and one line before "text", which
matches every file.
"""

SOURCES: dict[str, str] = {
    "dataset": "trainer.sources.tables:DatasetSource",
    "parquet": "trainer.sources.tables:ParquetSource",
    "jsonl": "trainer.sources.files:JsonLinesSource",
    "text": "trainer.sources.files:TextSource",
}
