-- What embedding_generation has computed. Primary data, as task_results: they go with the history of their task (OPERATOR_HISTORY_DAYS)
-- and with nothing else.

-- One row a task, written when its vectors are whole: in the transaction that writes the parts below, or that gives the file of
-- payload.outputPath its name. A retry replaces both.
CREATE TABLE task_vectors (
    task_uid          uuid        PRIMARY KEY,
    vectors           integer     NOT NULL,
    dimension         integer     NOT NULL,
    model             text        NOT NULL, -- name of the embedding model
    model_fingerprint text        NOT NULL,
    source_sha256     text        NOT NULL, -- of what was embedded: which text a vector is of is known by its row in that
    output            text        NOT NULL, -- postgres, or payload.outputPath
    output_sha256     text,                 -- of that file
    created_at        timestamptz NOT NULL DEFAULT now()
);

-- The vectors themselves where output is postgres: up to TASKS_INLINE_RESULT_BYTES in all, some 2 MiB a row.
CREATE TABLE task_vector_parts (
    task_uid uuid    NOT NULL REFERENCES task_vectors ON DELETE CASCADE,
    first    integer NOT NULL, -- number of its first vector, from 0
    ids      jsonb   NOT NULL, -- of each vector: the id of its row in the input, or null
    vectors  bytea   NOT NULL, -- float32, little-endian, one vector after the other
    PRIMARY KEY (task_uid, first)
);
