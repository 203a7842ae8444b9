-- What a check of a whole knowledge base found, and the state that follows from it.

ALTER TABLE documents
    ADD COLUMN checked_at timestamptz,                   -- when both stores were last read back, by a publication or a check
    ADD COLUMN missing    integer NOT NULL DEFAULT 0,    -- chunks of the published version that a store lacked then, summed
    ADD COLUMN extra      integer NOT NULL DEFAULT 0;    -- rows that belong to no version then, summed over both stores
CREATE INDEX documents_inconsistent ON documents (namespace, kb_id) WHERE missing > 0 OR extra > 0;
CREATE INDEX document_versions_intents ON document_versions (namespace, kb_id) WHERE state = 'intent';

-- What reading the document has found (pages, failed pages, language), for the results of those who need not read it again.
ALTER TABLE document_versions ADD COLUMN facts jsonb;

-- Which collections and indices a knowledge base has. Readers see the one that knowledge_bases.generation names.
CREATE TABLE generations (
    namespace         text        NOT NULL,
    kb_id             text        NOT NULL,
    generation        integer     NOT NULL,
    model_fingerprint text        NOT NULL,
    dimension         integer     NOT NULL,
    created_at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (namespace, kb_id, generation),
    FOREIGN KEY (namespace, kb_id) REFERENCES knowledge_bases ON DELETE CASCADE
);
INSERT INTO generations (namespace, kb_id, generation, model_fingerprint, dimension, created_at)
SELECT namespace, kb_id, generation, model_fingerprint, dimension, created_at FROM knowledge_bases;

-- The state of the index of a knowledge base. It is computed, so that it is right at any time and nobody has to write it:
--   degraded   a check found chunks missing that readers should see, and nothing has repaired it yet
--   indexing   a task works on it
--   ready      otherwise; one from which all documents were deleted is ready as well
CREATE VIEW knowledge_base_states AS
SELECT base.namespace, base.kb_id, base.generation, base.model_fingerprint, base.dimension,
       found.documents, found.chunks, found.missing, found.extra, found.checked_at, intents.intents,
       CASE WHEN found.missing > 0 THEN 'degraded'
            WHEN intents.intents > 0 THEN 'indexing'
            ELSE 'ready' END AS state,
       greatest(base.created_at, found.updated_at) AS updated_at
  FROM knowledge_bases AS base
 CROSS JOIN LATERAL (
       SELECT count(*) FILTER (WHERE chunk_count > 0)      AS documents,
              coalesce(sum(chunk_count), 0)                AS chunks,
              coalesce(sum(missing), 0)                    AS missing,
              coalesce(sum(extra), 0)                      AS extra,
              min(checked_at) FILTER (WHERE chunk_count > 0) AS checked_at, -- of the document that was read back longest ago
              max(updated_at)                              AS updated_at
         FROM documents WHERE documents.namespace = base.namespace AND documents.kb_id = base.kb_id) AS found
 CROSS JOIN LATERAL (
       SELECT count(*) AS intents FROM document_versions
        WHERE document_versions.namespace = base.namespace AND document_versions.kb_id = base.kb_id AND state = 'intent'
       ) AS intents;
