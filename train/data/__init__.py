"""Records and recordings: read, prepared, stored and grouped for training; two systems.

The language model learns from samples in shards, packed into rows: `records`, `samples`, `shards`,
`examples`, `prepare`, `readers`, `tfio_reader`, `model_folder`, and `language.data`. Single
networks learn from prepared folders of clips in batches of like length: `recordings`, `bucketing`,
and `networks.flow_data` and `networks.speech_data`.
"""
