-- Deletion of knowledge bases, and what is known of sweeping. A deleted document needs neither table nor column: it is a
-- published version of no chunks.

-- Knowledge bases that were deleted, by whom: an older task publishes nothing in them any more. The generation is that whose
-- collection and index go; null where there was none, or where newer documents stay.
CREATE TABLE knowledge_base_deletions (
    namespace       text        NOT NULL,
    kb_id           text        NOT NULL,
    task_uid        uuid        NOT NULL,
    task_created_at timestamptz NOT NULL,
    generation      integer,
    documents       integer     NOT NULL DEFAULT 0, -- that readers saw before
    deleted_at      timestamptz NOT NULL DEFAULT now(),
    dropped_at      timestamptz,                    -- both stores were found without that generation
    PRIMARY KEY (namespace, kb_id, task_uid)
);
CREATE INDEX knowledge_base_deletions_by_task ON knowledge_base_deletions (task_uid);

-- When the rows of a version that will never be published were last looked for and not there any more.
ALTER TABLE document_versions ADD COLUMN swept_at timestamptz;
CREATE INDEX document_versions_unswept ON document_versions (namespace) WHERE state = 'canceled' AND swept_at IS NULL;
CREATE INDEX documents_by_update ON documents (namespace, updated_at);

-- The last sweep of each namespace.
CREATE TABLE sweeps (
    namespace   text        PRIMARY KEY,
    finished_at timestamptz NOT NULL,
    summary     jsonb       NOT NULL DEFAULT '{}'
);
