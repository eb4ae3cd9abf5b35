"""Data sources: documents in files and datasets, the index of their windows, and the order of samples.

SOURCES is the registry of file formats: name -> "module:class" of a trainer.sources.base.Source. The suffix of a file,
or `file_format` in its section, names the format. A new format is one file with a Source and one line here.
"""

SOURCES: dict[str, str] = {
    "text": "trainer.sources.text_files:TextSource",
    "json": "trainer.sources.json_files:JsonSource",
    "csv": "trainer.sources.csv_files:CsvSource",
    "tsv": "trainer.sources.csv_files:TsvSource",
    "parquet": "trainer.sources.tables:ParquetSource",
    "arrow": "trainer.sources.tables:ArrowSource",
    "dataset": "trainer.sources.tables:DatasetSource",
}
