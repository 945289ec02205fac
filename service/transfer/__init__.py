"""Export and import of projects: the rows and objects of an installation in one tar archive.

The members of the archive, in this order:

    header.json          the format, the revision of the database, the unfinished jobs
    rows/{table}.jsonl   one row per line, with its column names
    objects/{sha256}     the bytes of the artifacts, by SHA-256
    manifest.json        the SHA-256 of the header and the rows, and the number of objects

The archive is reproducible: it has no times or places, so equal content gives equal bytes. It contains no API keys,
secrets, workers or weights of base models.
"""
