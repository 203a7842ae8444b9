-- What batch_processing is to do, as its first pod has listed it, and what has become of each document. Primary data: the
-- set of documents is fixed by the first listing, whatever changes in a folder later; which shards are left follows from it.
CREATE TABLE batches (
    task_uid  uuid PRIMARY KEY,
    total     integer     NOT NULL,
    listed_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE batch_documents (
    task_uid    uuid        NOT NULL REFERENCES batches ON DELETE CASCADE,
    ordinal     integer     NOT NULL,               -- from 1, in the order of the list
    shard       integer     NOT NULL,
    file_path   text        NOT NULL,
    document_id text        NOT NULL,
    metadata    jsonb       NOT NULL DEFAULT '{}',
    state       text        NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'done', 'failed')),
    reason      text,                               -- Completed, Unchanged, Superseded, Duplicate; or of its last error
    message     text,
    version     bigint,
    chunks      integer,
    embedded    integer,
    reused      integer,
    begun       smallint    NOT NULL DEFAULT 0,     -- how often a pod has taken it up: what kills pods comes last
    attempt     smallint,                           -- of the task, that took it up last
    updated_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (task_uid, ordinal)
);
CREATE INDEX batch_documents_by_state ON batch_documents (task_uid, state, shard, begun, ordinal);
