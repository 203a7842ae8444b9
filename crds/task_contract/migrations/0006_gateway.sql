-- What the gateway needs: tickets, and lists that are fast among a million tasks.

-- A ticket stands for a caller once, for some seconds. The digest of it is kept, and of the caller what the cluster said of him:
-- neither ticket nor token can be read here.
CREATE TABLE gateway_tickets (
    digest     bytea       PRIMARY KEY,
    caller     text        NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE INDEX gateway_tickets_by_expiry ON gateway_tickets (expires_at);

-- Lists go from the youngest task on, by (created_at, uid). Lists of a knowledge base use tasks_by_knowledge_base. Of the other
-- filters phase has an index for all its values; type and priority for those that are rare, since a list of what most tasks are
-- finds its page in tasks_by_creation at once.
CREATE INDEX tasks_by_creation ON tasks (namespace, created_at DESC, uid DESC);
CREATE INDEX tasks_by_phase ON tasks (namespace, phase, created_at DESC, uid DESC);
CREATE INDEX tasks_by_rare_type ON tasks (namespace, type, created_at DESC, uid DESC) WHERE type <> 'document_processing';
CREATE INDEX tasks_by_rare_priority ON tasks (namespace, priority, created_at DESC, uid DESC) WHERE priority <> 'normal';
