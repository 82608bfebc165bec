-- Build, swap, cleanup and the way back by hand: what each refuses, what comes
-- back and how, and what was in the way of it.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;
CREATE SCHEMA swap;
SET search_path = swap, public;

CREATE VIEW way AS SELECT state, steps_done, way_back, next_call FROM rm_migrations ORDER BY id DESC LIMIT 1;
-- everything of a table by which it can be told from another
CREATE FUNCTION shape(name) RETURNS SETOF text LANGUAGE sql AS $$
	SELECT format('%s %s%s', attname, format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN ' NOT NULL' END)
	FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped
	UNION ALL SELECT pg_get_indexdef(indexrelid) || CASE WHEN indisvalid THEN '' ELSE ' INVALID' END
	FROM pg_index WHERE indrelid = $1::text::regclass
	UNION ALL SELECT conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
	WHERE conrelid = $1::text::regclass AND contype IN ('c', 'f')
	UNION ALL SELECT tgname::text FROM pg_trigger WHERE tgrelid = $1::text::regclass AND NOT tgisinternal
	ORDER BY 1
$$;

-- 1. Out of turn
CREATE TABLE day (id int PRIMARY KEY, d text NOT NULL, n int);
INSERT INTO day VALUES (1, '2024-1-1', 1), (2, '2024-01-02', 2), (3, 'Jan 3 2024', 3);
CREATE INDEX day_d ON day (d);
CREATE TABLE before AS SELECT * FROM day;
SELECT array_agg(s) AS before FROM shape('day') s \gset
CALL rm_swap();
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('day', 'd', 'date', 'd::date');
CALL rm_swap();
\echo SQLSTATE :SQLSTATE
CALL rm_cleanup();
\echo SQLSTATE :SQLSTATE
CALL rm_backfill_batched();
CALL rm_swap();
\echo SQLSTATE :SQLSTATE
CALL rm_enforce_not_null();
CALL rm_cleanup();
\echo SQLSTATE :SQLSTATE
TABLE way;
BEGIN;
CALL rm_swap();
\echo SQLSTATE :SQLSTATE
ROLLBACK;
BEGIN;
CALL rm_cleanup();
\echo SQLSTATE :SQLSTATE
ROLLBACK;
CALL rm_swap(NULL);
TABLE way;
SET client_min_messages = notice;
CALL rm_swap();
SET client_min_messages = warning;

-- 2. What nobody has written comes back to the letter, the rest as the cast says
UPDATE day SET n = -n;
UPDATE day SET d = '2025-02-02' WHERE id = 2;
INSERT INTO day (id, d) VALUES (4, '2026-03-03');
SELECT id, d, d_old FROM day ORDER BY id;
CALL rm_rollback();
TABLE way;
SELECT id, d, d = (SELECT b.d FROM before b WHERE b.id = day.id) AS as_before FROM day ORDER BY id;
SELECT array_agg(s) = :'before' AS shape_as_before FROM shape('day') s;
SET client_min_messages = notice;
CALL rm_rollback(1);
SET client_min_messages = warning;

-- 3. After the cleanup there is no way back
CALL rm_alter_type('day', 'd', 'date', 'd::date');
CALL rm_cleanup();
SET client_min_messages = notice;
CALL rm_cleanup(2);
SET client_min_messages = warning;
CALL rm_rollback(2);
\echo SQLSTATE :SQLSTATE
CALL rm_swap(2);
\echo SQLSTATE :SQLSTATE
CALL rm_swap(99);
\echo SQLSTATE :SQLSTATE
SELECT * FROM shape('day');
-- the same column once more
CALL rm_alter_type('day', 'd', 'timestamp');
CALL rm_rollback();
SELECT * FROM shape('day');

-- 4. The expression for the way back
CREATE TABLE num (id int PRIMARY KEY, v text UNIQUE, w text);
INSERT INTO num SELECT i, '0' || i, 'w' FROM generate_series(1, 5) i;
CALL rm_add_column('num', 'v', 'int', 'v::int', 'no_such_column::text');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('num', 'v', 'int', 'v::int', 'v::text || random()::text');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('num', 'id', 'text', 'id::text', 'id');
\echo SQLSTATE :SQLSTATE
SELECT state FROM rm_migrations WHERE relation LIKE '%num' ORDER BY id;
-- no cast: open forth, closed back
CREATE TABLE flags (f boolean);
INSERT INTO flags VALUES (true), (false);
CALL rm_alter_type('flags', 'f', 'date', $$CASE WHEN f THEN date '2024-01-01' END$$);
TABLE way;
INSERT INTO flags (f) VALUES ('2025-01-01');
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
CALL rm_cleanup();
SELECT * FROM flags ORDER BY f;
-- several columns: a cast of the result is not what was in one of them
CREATE TABLE moment (id int PRIMARY KEY, d text, t text, n int);
INSERT INTO moment VALUES (1, '2024-1-1', '10:00'), (2, '2024-1-2', '11:00');
CALL rm_alter_type('moment', 'd', 'timestamp', $$(d || ' ' || t)::timestamp$$);
TABLE way;
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
CALL rm_cleanup();
DROP TABLE moment;
CREATE TABLE moment (id int PRIMARY KEY, d text, t text, n int);
INSERT INTO moment VALUES (1, '2024-1-1', '10:00'), (2, '2024-1-2', '11:00');
CALL rm_alter_type('moment', 'd', 'timestamp', $$(d || ' ' || t)::timestamp$$, reverse_expr => $$d::date || ' at ' || t$$);
TABLE way;
UPDATE moment SET n = 1;
SELECT id, d_old FROM moment ORDER BY id;
UPDATE moment SET t = '12:00' WHERE id = 2;
SELECT id, d_old FROM moment ORDER BY id;
-- what it reads cannot go unnoticed, nor change its type at the same time
ALTER TABLE moment DROP COLUMN t;
CALL rm_add_column('moment', 't', 'time', 't::time');
\echo SQLSTATE :SQLSTATE
CALL rm_rollback();
CALL rm_add_column('moment', 't', 'interval', 't::interval');
CALL rm_add_column('moment', 'n', 'text', 'n || t');
\echo SQLSTATE :SQLSTATE
CALL rm_add_column('moment', 't_new', 'text');
\echo SQLSTATE :SQLSTATE
CALL rm_rollback();
SELECT id, d, t FROM moment ORDER BY id;

-- 5. Values that do not fit the old type
CREATE TABLE big (id int PRIMARY KEY, v int NOT NULL, u text);
INSERT INTO big SELECT i, i FROM generate_series(1, 5) i;
CALL rm_alter_type('big', 'v', 'bigint');
UPDATE big SET v = 5000000000 WHERE id = 2;
INSERT INTO big (id, v) VALUES (6, 6000000000), (7, 7);
TABLE way;
SELECT row_key, value, sqlstate, message, way_back FROM rm_conversion_errors ORDER BY 1;
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
TABLE way;
SELECT row_key, value, way_back FROM rm_conversion_errors ORDER BY 1;
SELECT * FROM shape('big');
-- mended: one row written, one deleted
UPDATE big SET v = 22 WHERE id = 2;
DELETE FROM big WHERE id = 6;
CALL rm_rollback();
TABLE way;
SELECT * FROM big ORDER BY id;
SELECT * FROM shape('big');
-- an interrupted look has to be begun again: its records are gone
CALL rm_alter_type('big', 'v', 'bigint');
UPDATE big SET v = 5000000000 WHERE id = 2;
DELETE FROM risky_migrations.conversion_error;
UPDATE risky_migrations.migration SET phase = 6 WHERE state = 'open';
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
UPDATE big SET v = 2 WHERE id = 2;
CALL rm_rollback();
-- an interrupted way back goes on
CALL rm_alter_type('big', 'v', 'bigint');
UPDATE risky_migrations.migration SET phase = 1 WHERE state = 'open';
CALL rm_rollback();
TABLE way;
-- what was in the way is gone: values are made up for, but not where NULL is right
CREATE FUNCTION small(bigint) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
	IF $1 > 100 THEN
		RAISE 'too large';
	END IF;
	RETURN $1;
END $$;
CALL rm_alter_type('big', 'u', 'bigint', $$coalesce(u, '0')::bigint$$, reverse_expr => 'small(u)');
UPDATE big SET u = 1000 WHERE id = 1;
UPDATE big SET u = 7, v = 7 WHERE id = 7;
UPDATE big SET v = 33 WHERE id = 3;
SELECT row_key, value, message FROM rm_conversion_errors ORDER BY 1;
CREATE OR REPLACE FUNCTION small(bigint) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT $1::text';
CALL rm_rollback();
SELECT * FROM big ORDER BY id;

-- 6. A way back that fails leaves nothing that refuses a write
CREATE TABLE uniq (id int PRIMARY KEY, v text NOT NULL UNIQUE);
INSERT INTO uniq SELECT i, i * 10 FROM generate_series(1, 5) i;
CREATE INDEX uniq_v ON uniq (v);
SELECT array_agg(s) AS before FROM shape('uniq') s \gset
CALL rm_alter_type('uniq', 'v', 'int', 'v::int', reverse_expr => '(v / 10)::text || ''0''');
UPDATE uniq SET v = 1001 WHERE id = 1;
UPDATE uniq SET v = 1002 WHERE id = 2;
\set VERBOSITY sqlstate
CALL rm_rollback();
\set VERBOSITY default
SELECT regexp_replace(s, '_[0-9]+ ', '_N ') FROM shape('uniq') s;
UPDATE uniq SET v = 1003 WHERE id = 3;
UPDATE uniq SET v = id;
UPDATE uniq SET v = id * 10;
CALL rm_rollback();
SELECT array_agg(s) = :'before' AS shape_as_before FROM shape('uniq') s;

-- 7. What changes under it
CREATE TABLE peer (id int PRIMARY KEY);
INSERT INTO peer SELECT generate_series(1, 3);
CREATE TABLE child (id int PRIMARY KEY, p int REFERENCES peer, k int);
INSERT INTO child SELECT i, i, i FROM generate_series(1, 3) i;
CREATE INDEX both_of ON child (p, k) WITH (fillfactor = 60);
-- options and comments between build and swap; names
CALL rm_alter_type('child', 'p', 'bigint', cut_over => 'manual');
ALTER INDEX both_of SET (fillfactor = 70);
COMMENT ON INDEX both_of IS 'both';
ALTER TABLE child RENAME TO kid;
ALTER TABLE kid RENAME p TO pp;
CALL rm_cut_over();
SELECT regexp_replace(s, '_[0-9]+ ', '_N ') FROM shape('kid') s;
SELECT obj_description('both_of'::regclass);
-- names after the swap
ALTER TABLE kid RENAME TO child;
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
ALTER TABLE child RENAME TO kid;
ALTER TABLE kid RENAME p_old TO x;
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
ALTER TABLE kid RENAME x TO p_old;
CALL rm_rollback();
SELECT * FROM shape('kid');
-- something on the new column
CALL rm_alter_type('kid', 'pp', 'bigint');
CREATE INDEX later ON kid (pp DESC);
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
DROP INDEX later;
-- the other end of the foreign key
DROP TABLE peer CASCADE;
CALL rm_rollback();
SELECT * FROM shape('kid');
-- what came too late
CALL rm_alter_type('kid', 'pp', 'bigint', cut_over => 'manual');
CREATE FUNCTION reads_pp() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(pp) FROM kid; END;
ALTER TABLE kid ADD twice int GENERATED ALWAYS AS (pp * 2) STORED;
CALL rm_cut_over();
\echo SQLSTATE :SQLSTATE
DROP FUNCTION reads_pp;
ALTER TABLE kid DROP twice;
CALL rm_cut_over();
-- dropped by the user
ALTER TABLE kid DROP pp_old;
ALTER TABLE kid DROP pp_old CASCADE;
CALL rm_rollback();
\echo SQLSTATE :SQLSTATE
CALL rm_cleanup();
SELECT * FROM shape('kid');

-- 8. Two columns at a time, back in each order
CREATE TABLE two (id int PRIMARY KEY, a text, b text, CHECK (a IS NOT NULL OR b IS NOT NULL));
INSERT INTO two SELECT i, '0' || i, '00' || i FROM generate_series(1, 5) i;
CREATE INDEX ab ON two (a, b);
CREATE UNIQUE INDEX ba ON two (b, a, id);
CREATE STATISTICS st ON a, b FROM two;
SELECT array_agg(s) AS before FROM shape('two') s \gset
CALL rm_alter_type('two', 'a', 'int', 'a::int');
CALL rm_alter_type('two', 'b', 'int', 'b::int');
SELECT max(id) AS second, max(id) - 1 AS first FROM rm_migrations \gset
CALL rm_rollback(:first);
CALL rm_rollback(:second);
SELECT array_agg(s) = :'before' AS shape_as_before FROM shape('two') s;
SELECT * FROM two ORDER BY id LIMIT 1;
CALL rm_alter_type('two', 'a', 'int', 'a::int', cut_over => 'manual');
CALL rm_alter_type('two', 'b', 'int', 'b::int', cut_over => 'manual');
SELECT max(id) AS second, max(id) - 1 AS first FROM rm_migrations \gset
CALL rm_cut_over(:second);
CALL rm_cut_over(:first);
UPDATE two SET a = 70, b = 80 WHERE id = 2;
CALL rm_rollback(:second);
CALL rm_rollback(:first);
SELECT array_agg(s) = :'before' AS shape_as_before FROM shape('two') s;
SELECT * FROM two ORDER BY id LIMIT 2;
CALL rm_alter_type('two', 'a', 'int', 'a::int');
CALL rm_alter_type('two', 'b', 'int', 'b::int');
SELECT max(id) AS second, max(id) - 1 AS first FROM rm_migrations \gset
CALL rm_cleanup(:first);
CALL rm_rollback(:second);
SELECT * FROM shape('two');
SELECT count(*) FROM pg_statistic_ext WHERE stxrelid = 'two'::regclass;

-- 9. What the old type cannot tell is lost on the way back, and only that
CREATE TABLE again (id int PRIMARY KEY, v text);
INSERT INTO again VALUES (1, '1.50'), (2, '2.50');
CALL rm_add_column('again', 'v', 'numeric', 'v::numeric', 'trunc(v)::text');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
CALL rm_swap();
UPDATE again SET v = 9.75 WHERE id = 2;
CALL rm_rollback();
SELECT * FROM again ORDER BY id;

-- 10. NULL for what does not convert, through the swap and back
CREATE TABLE loose (id int PRIMARY KEY, v text);
INSERT INTO loose VALUES (1, '1'), (2, 'two'), (3, NULL);
CALL rm_alter_type('loose', 'v', 'int', 'v::int', on_error => 'null');
UPDATE loose SET id = id + 10;
INSERT INTO loose (id, v) VALUES (4, 44);
SELECT id, v, v_old FROM loose ORDER BY id;
TABLE way;
CALL rm_rollback();
SELECT * FROM loose ORDER BY id;

-- 11. Refusals are listed together; publications can be accepted
CREATE MATERIALIZED VIEW kept AS SELECT v FROM loose;
CREATE FUNCTION reads_v() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(v) FROM loose; END;
SET client_min_messages = error;	-- whatever wal_level is
CREATE PUBLICATION regress_rm_swap FOR TABLE loose;
SET client_min_messages = warning;
CALL rm_add_column('loose', 'v', 'int', '0');
\echo SQLSTATE :SQLSTATE
DROP MATERIALIZED VIEW kept;
DROP FUNCTION reads_v;
CALL rm_add_column('loose', 'v', 'int', '0');
\echo SQLSTATE :SQLSTATE
SET risky_migrations.accept_publications = on;
CALL rm_add_column('loose', 'v', 'int', '0');
RESET risky_migrations.accept_publications;
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
CALL rm_swap();
TABLE way;
CALL rm_rollback();
DROP PUBLICATION regress_rm_swap;

-- 12. The lab's migration, swapped
CREATE SCHEMA swap_lab;
-- the cast back writes moments in the form of the settings
SET DateStyle = 'ISO, YMD';
SET search_path = swap_lab, public;
CALL rm_migrate('0001');
SELECT rm_seed(20);
-- the shadow column made anew
CALL rm_migrate('0004');
CALL rm_migrate('0003');
CALL rm_migrate('0005');
CALL rm_swap();
INSERT INTO large_record (name, created_at) VALUES ('written 2030-01-01 00:00:00', '2030-01-01 00:00:00');
UPDATE large_record SET name = 'written 2031-01-01 00:00:00', created_at = '2031-01-01 00:00:00' WHERE id = 3;
SELECT applied, number FROM rm_showmigrations();
SELECT * FROM rm_lab_check();
SELECT count(*) FROM large_record WHERE created_at_old::timestamp IS DISTINCT FROM created_at;
CALL rm_migrate('0005');
SELECT applied, number FROM rm_showmigrations();
-- what has come since the columns changed places is not trusted
CALL rm_swap();
\echo SQLSTATE :SQLSTATE
CALL rm_enforce_not_null();
CALL rm_swap();
CALL rm_migrate('0001');
SELECT applied, number FROM rm_showmigrations();
SELECT * FROM rm_lab_check();
CALL rm_migrate('zero');

-- 13. Conditions are made again from what PostgreSQL says of them: the cast to text
-- that a varchar is compared by stays, as ALTER TABLE leaves it in a CHECK
SET search_path = swap, public;
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TABLE said (id int PRIMARY KEY, v varchar(50) CHECK (v <> 'x'));
INSERT INTO said VALUES (1, '2024-01-01 00:00:00');
CREATE TABLE altered (LIKE said INCLUDING ALL);
CREATE VIEW said_view AS SELECT id FROM said WHERE v <> 'x';
CREATE TRIGGER said_trigger AFTER UPDATE OF v ON said FOR EACH ROW
	WHEN (old.v IS DISTINCT FROM new.v) EXECUTE FUNCTION nothing();
CREATE POLICY said_policy ON said USING (v <> 'x');
CREATE RULE said_rule AS ON DELETE TO said WHERE old.v = 'x' DO INSTEAD NOTHING;
CALL rm_alter_type('said', 'v', 'timestamp', 'v::timestamp');
CALL rm_cleanup();
ALTER TABLE altered ALTER v TYPE timestamp USING v::timestamp;
SELECT conrelid::regclass, pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid IN ('said'::regclass, 'altered'::regclass) AND contype = 'c' ORDER BY 1;
SELECT pg_get_viewdef('said_view') ~ 'v\)::text <> ''x''::text' AS view,
	pg_get_triggerdef((SELECT oid FROM pg_trigger WHERE tgname = 'said_trigger'))
		~ '\(old\.v\)::text IS DISTINCT FROM \(new\.v\)::text' AS trigger,
	(SELECT pg_get_expr(polqual, polrelid) FROM pg_policy WHERE polname = 'said_policy')
		= '((v)::text <> ''x''::text)' AS policy,
	pg_get_ruledef((SELECT oid FROM pg_rewrite WHERE rulename = 'said_rule'))
		~ '\(old\.v\)::text = ''x''::text' AS rule;

SET search_path = public;
DROP SCHEMA swap_lab;
DROP SCHEMA swap CASCADE;
DROP EXTENSION risky_migrations CASCADE;
