-- Tables of the first release. Migrations only add; what is no longer used is removed one release later.

-- The projection: one row a task, rebuilt from the CRs at any time. A row is replaced only by a newer resourceVersion.
CREATE TABLE tasks (
    uid              uuid PRIMARY KEY,
    namespace        text        NOT NULL,
    name             text        NOT NULL,
    kb_id            text,
    type             text        NOT NULL,
    priority         text        NOT NULL,
    phase            text        NOT NULL,
    stage            text,
    progress         smallint,
    attempt          smallint    NOT NULL DEFAULT 0,
    job              text,
    spec             jsonb       NOT NULL,
    result           jsonb,
    error            jsonb,
    queue            jsonb,
    attempts         jsonb       NOT NULL DEFAULT '[]',
    created_at       timestamptz NOT NULL,
    queued_at        timestamptz,
    started_at       timestamptz,
    finished_at      timestamptz,
    deleted_at       timestamptz,
    generation       bigint      NOT NULL,
    resource_version bigint      NOT NULL,
    updated_at       timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX tasks_by_name ON tasks (namespace, name, created_at DESC);
CREATE INDEX tasks_by_knowledge_base ON tasks (namespace, kb_id, created_at DESC);
CREATE INDEX tasks_live ON tasks (phase, created_at) WHERE finished_at IS NULL;

-- How each attempt ended, written by the runner before it exits: serves when the termination message or the pod is gone.
CREATE TABLE task_results (
    task_uid   uuid        NOT NULL,
    attempt    smallint    NOT NULL,
    holder     text        NOT NULL,
    outcome    jsonb       NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (task_uid, attempt)
);

-- The fence over a whole task. The operator inserts a row to cancel; a commit holds a shared advisory lock on the task's
-- uid and looks here first, the operator holds the exclusive one, so that either the commit or the fence comes first.
CREATE TABLE task_fences (
    task_uid  uuid PRIMARY KEY,
    reason    text        NOT NULL,
    raised_at timestamptz NOT NULL DEFAULT now()
);

-- The knowledge ledger: primary data, the truth of what readers may see.
CREATE TABLE knowledge_bases (
    namespace         text        NOT NULL,
    kb_id             text        NOT NULL,
    generation        integer     NOT NULL DEFAULT 1,
    model_fingerprint text        NOT NULL,
    dimension         integer     NOT NULL,
    created_at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (namespace, kb_id)
);

CREATE TABLE documents (
    namespace            text        NOT NULL,
    kb_id                text        NOT NULL,
    document_id          text        NOT NULL,
    last_version         bigint      NOT NULL DEFAULT 0, -- the highest number allotted
    published_version    bigint,                         -- what readers see; null before the first publication
    published_task_uid   uuid,
    published_task_at    timestamptz,                    -- creation of the task that published: an older task is superseded
    content_hash         text,                           -- hash of (source bytes, pipeline fingerprint) of the published version
    chunk_count          integer,
    updated_at           timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (namespace, kb_id, document_id),
    FOREIGN KEY (namespace, kb_id) REFERENCES knowledge_bases
);

-- Intents: who writes which version of a document. The epoch is the fence: commit and cancel are conditional on it.
CREATE TABLE document_versions (
    namespace       text        NOT NULL,
    kb_id           text        NOT NULL,
    document_id     text        NOT NULL,
    version         bigint      NOT NULL,
    task_uid        uuid        NOT NULL,
    task_created_at timestamptz NOT NULL,
    state           text        NOT NULL DEFAULT 'intent'
                    CHECK (state IN ('intent', 'published', 'superseded', 'unchanged', 'canceled')),
    epoch           bigint      NOT NULL DEFAULT 1,
    holder          text        NOT NULL,
    content_hash    text,
    chunk_count     integer,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (namespace, kb_id, document_id, version),
    UNIQUE (namespace, kb_id, document_id, task_uid), -- a retry of a task keeps its number
    FOREIGN KEY (namespace, kb_id, document_id) REFERENCES documents ON DELETE CASCADE
);
CREATE INDEX document_versions_by_task ON document_versions (task_uid);
