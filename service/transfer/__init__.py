"""A project moved from one installation to another: its rows and its objects in one tar file.

The file's members, in this order:

    header.json          the format, the database's revision, jobs that had not ended
    rows/{table}.jsonl   a row a line, with the names of its columns
    objects/{sha256}     the artifacts' bytes, in the order of their names
    manifest.json        the SHA-256 of every member before but objects, whose names are theirs, and how many these are

Nothing in it says when or where it was made: equal content gives equal bytes. Keys, secrets, workers and the weights of
base models are not in it.
"""
