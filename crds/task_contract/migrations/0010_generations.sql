-- Rebuilds: a knowledge base has further generations beside the one that readers see, which knowledge_bases.generation names.

-- States: filling (a rebuild or a rollback brings documents into it), serving, retained (it served before and is kept for a
-- rollback). A generation that is not needed any more has no row here and one in generation_drops.
ALTER TABLE generations
    ADD COLUMN state           text NOT NULL DEFAULT 'serving', -- filling, serving, retained
    ADD COLUMN embedding_model text,                            -- name of the model, for people; null of what no rebuild has made
    ADD COLUMN splitting       jsonb NOT NULL DEFAULT '{}',     -- what the rebuild wants of all documents; absent: what each has
    ADD COLUMN task_uid        uuid,                            -- of the rebuild or rollback that fills or has filled it
    ADD COLUMN switched_at     timestamptz,                     -- when that task has made it serve
    ADD COLUMN aliases_at      timestamptz,                     -- when the aliases of both stores were seen to lead to it since
    ADD COLUMN keep_until      timestamptz,                     -- of one that has served: how long it is kept
    ADD COLUMN facts           jsonb NOT NULL DEFAULT '{}';     -- fields of the result of that task
CREATE INDEX generations_by_task ON generations (task_uid) WHERE task_uid IS NOT NULL;

-- What a generation that does not serve holds. Of the one that serves documents says it.
CREATE TABLE generation_documents (
    namespace    text    NOT NULL,
    kb_id        text    NOT NULL,
    generation   integer NOT NULL,
    document_id  text    NOT NULL,
    version      bigint  NOT NULL,
    content_hash text    NOT NULL,
    chunk_count  integer NOT NULL,
    PRIMARY KEY (namespace, kb_id, generation, document_id),
    FOREIGN KEY (namespace, kb_id, generation) REFERENCES generations ON DELETE CASCADE
);

-- Who rebuilds, rolls back, repairs or analyzes a knowledge base: one task at a time. What it writes here is conditional on the
-- epoch, as that of an intent.
CREATE TABLE knowledge_base_leases (
    namespace  text        NOT NULL,
    kb_id      text        NOT NULL,
    task_uid   uuid,                                       -- null: nobody
    holder     text        NOT NULL,
    epoch      bigint      NOT NULL DEFAULT 1,
    renewed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (namespace, kb_id),
    FOREIGN KEY (namespace, kb_id) REFERENCES knowledge_bases ON DELETE CASCADE
);

-- Generations whose collection and index go. Numbers are not given again.
CREATE TABLE generation_drops (
    namespace  text        NOT NULL,
    kb_id      text        NOT NULL,
    generation integer     NOT NULL,
    since      timestamptz NOT NULL DEFAULT now(),
    dropped_at timestamptz,                                -- both stores were found without it
    PRIMARY KEY (namespace, kb_id, generation)
);
CREATE INDEX generation_drops_open ON generation_drops (namespace, since) WHERE dropped_at IS NULL;
