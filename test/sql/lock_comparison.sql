-- ALTER COLUMN TYPE against the three steps: which locks, whom they keep out,
-- what is rewritten, and how often the table is read from end to end.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;

-- Sequential scans of the table so far; the extension's own reading, page by
-- page, is none.  To be called by a statement of its own after the statistics
-- were sent.
CREATE FUNCTION scans(rel regclass) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_stat_clear_snapshot();
	RETURN pg_stat_get_numscans(rel);
END
$$;
CREATE FUNCTION storage() RETURNS oid[] LANGUAGE sql AS $$
	SELECT array_agg(pg_relation_filenode(c.oid) ORDER BY c.relname)
	FROM pg_class c WHERE c.relname IN ('large_record', 'large_record_pkey')
$$;

CALL rm_migrate('0001');
SELECT rm_seed(2000);
-- tables that were just made: nobody else knows them yet
SELECT approach, step, relation, role, lock_mode, blocks_reads, blocks_writes, hold_is_exact, rewritten
FROM rm_lock_report();

-- the direct change: nobody reads, nobody writes, everything is written anew
SELECT storage() AS before \gset
CALL rm_migrate('0002');
SELECT approach, step, relation, role, lock_mode, blocks_reads, blocks_writes, hold_is_exact, rewritten
FROM rm_lock_report() WHERE approach = 'direct';
SELECT storage() = :'before' AS same_storage;
-- and back
CALL rm_migrate('0001');
SELECT step, relation, lock_mode, blocks_reads, blocks_writes, hold_is_exact, rewritten
FROM rm_lock_report() WHERE step LIKE 'alter_type (%';

-- step 1: ACCESS EXCLUSIVE, but nothing is rewritten or read
SELECT storage() AS before \gset
SELECT pg_stat_force_next_flush() \gset
SELECT scans('large_record') AS before_scans \gset
CALL rm_migrate('0003');
SELECT approach, step, relation, role, lock_mode, blocks_reads, blocks_writes, hold_is_exact, rewritten
FROM rm_lock_report() WHERE step = 'add_column';
SELECT pg_stat_force_next_flush() \gset
SELECT storage() = :'before' AS same_storage, scans('large_record') - :before_scans AS scans;

-- step 2: nobody is kept out
CALL rm_migrate('0004');
SELECT approach, step, relation, role, lock_mode, blocks_reads, blocks_writes, hold_is_exact, rewritten
FROM rm_lock_report() WHERE step = 'backfill';
SELECT storage() = :'before' AS same_storage;

-- step 3: ACCESS EXCLUSIVE only to add the proven constraint and to believe
-- it; the one scan is that of VALIDATE CONSTRAINT, beside readers and writers
SELECT pg_stat_force_next_flush() \gset
SELECT scans('large_record') AS before_scans \gset
CALL rm_migrate('0005');
SELECT approach, step, relation, role, lock_mode, blocks_reads, blocks_writes, hold_is_exact, rewritten
FROM rm_lock_report() WHERE step = 'enforce_not_null';
SELECT pg_stat_force_next_flush() \gset
SELECT storage() = :'before' AS same_storage, scans('large_record') - :before_scans AS scans;
-- the counter would have shown it: SET NOT NULL without the constraint scans
CREATE TABLE control AS SELECT id FROM large_record;
SELECT pg_stat_force_next_flush() \gset
SELECT scans('control') AS before_scans \gset
ALTER TABLE control ALTER COLUMN id SET NOT NULL;
SELECT pg_stat_force_next_flush() \gset
SELECT scans('control') - :before_scans AS scans;

-- and back: milliseconds under ACCESS EXCLUSIVE, nothing rewritten
CALL rm_migrate('0001');
SELECT step, relation, lock_mode, blocks_reads, blocks_writes, hold_is_exact, rewritten
FROM rm_lock_report() WHERE approach = 'three_step' AND step LIKE '% (rollback)';
SELECT storage() = :'before' AS same_storage;

-- times: exact ones were stamped, bounds have no wait of their own
SELECT count(*) > 0 AS some,
	count(*) FILTER (WHERE hold_is_exact AND (wait_ms IS NULL OR hold_ms IS NULL)) AS exact_without_time,
	count(*) FILTER (WHERE NOT hold_is_exact AND wait_ms IS NOT NULL) AS waits_that_were_not_stamped,
	count(*) FILTER (WHERE hold_ms < 0 OR wait_ms < 0) AS negative,
	count(*) FILTER (WHERE hold_ms > 60000 OR wait_ms > 60000) AS absurd,
	count(*) FILTER (WHERE started_at > clock_timestamp()) AS in_the_future
FROM rm_lock_report();
-- what keeps readers out: the two ALTER TYPE the whole time, the three steps
-- never longer than it takes to change the catalogs
SELECT approach, count(*) FILTER (WHERE blocks_reads AND rewritten) > 0 AS reads_blocked_while_rewriting,
	count(*) FILTER (WHERE blocks_reads AND hold_ms > 0) > 0 AS hold_was_measured
FROM rm_lock_report() GROUP BY approach ORDER BY approach;

CALL rm_migrate('zero');
-- the tables are gone, what was done to them is still told
SELECT approach, count(DISTINCT (step, relation)) FROM rm_lock_report() GROUP BY approach ORDER BY approach;

DROP EXTENSION risky_migrations;
DROP TABLE control;
DROP FUNCTION scans, storage;
