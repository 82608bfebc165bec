-- What rm_advise says that ALTER TABLE would do is what ALTER TABLE does; what
-- method => 'auto' chooses, and why; and that nothing of it remains.
\set ECHO all
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS risky_migrations;
CREATE EXTENSION IF NOT EXISTS citext;
CREATE EXTENSION IF NOT EXISTS btree_gist;
RESET client_min_messages;
SET TimeZone = 'UTC';

-- 1. The truth: the ALTER is run on the rows, looked at, and rolled back
CREATE FUNCTION truth(relation regclass, col text, type text, expr text,
	OUT rewrites boolean, OUT indexes_rebuilt text[], OUT tables_read text[], OUT also_locked text[], OUT error text)
LANGUAGE plpgsql AS $$
DECLARE
	members oid[];
	referring oid[];
	stood record;
BEGIN
	WITH RECURSIVE m (oid) AS (SELECT relation::oid UNION SELECT inhrelid FROM m JOIN pg_inherits ON inhparent = m.oid)
	SELECT array_agg(oid) INTO members FROM m;
	SELECT coalesce(array_agg(DISTINCT conrelid), '{}') || members INTO referring FROM pg_constraint
	WHERE contype = 'f' AND confrelid = ANY (members);
	CREATE TEMP TABLE before AS
	SELECT c.oid, c.relkind, coalesce(x.indrelid, c.oid) AS tab, format('%s.%s', relnamespace::regnamespace, relname) AS name,
		pg_relation_filenode(c.oid) AS node, pg_stat_get_xact_numscans(c.oid) AS scans, coalesce(x.indisexclusion, false) AS excl
	FROM pg_class c LEFT JOIN pg_index x ON x.indexrelid = c.oid
	WHERE relnamespace = 'public'::regnamespace;
	BEGIN
		EXECUTE format('ALTER TABLE %s ALTER COLUMN %I TYPE %s%s', relation, col, type, ' USING ' || expr);
		CREATE TEMP TABLE after AS
		SELECT b.*, c.oid AS new_oid, pg_relation_filenode(c.oid) <> b.node AS changed,
			pg_stat_get_xact_numscans(b.oid) - b.scans + CASE WHEN c.oid <> b.oid THEN pg_stat_get_xact_numscans(c.oid) ELSE 0 END AS more_scans
		FROM before b JOIN pg_class c ON format('%s.%s', relnamespace::regnamespace, relname) = b.name;
		SELECT bool_or(changed) FILTER (WHERE relkind = 'r' AND oid = ANY (members)),
			coalesce(array_agg(name ORDER BY name COLLATE "C") FILTER (WHERE relkind = 'i' AND changed AND tab = ANY (members)), '{}')
		INTO rewrites, indexes_rebuilt FROM after;
		-- scans of a table and its indexes, but for rewriting the one and building the others; those
		-- of exclusion constraints look for each row
		SELECT coalesce(array_agg(t.name ORDER BY t.name COLLATE "C"), '{}') INTO tables_read
		FROM after t
		CROSS JOIN LATERAL (SELECT sum(more_scans) FILTER (WHERE NOT excl) - count(*) FILTER (WHERE changed)
				- count(*) FILTER (WHERE changed AND excl) AS n
			FROM after i WHERE i.tab = t.oid) i
		WHERE t.relkind = 'r' AND t.oid = ANY (referring) AND i.n > 0
			-- not because another table refers to it
			AND (t.oid <> ALL (SELECT confrelid FROM pg_constraint WHERE contype = 'f')
				OR t.oid = ANY (SELECT conrelid FROM pg_constraint WHERE contype = 'f'));
		SELECT coalesce(array_agg(DISTINCT b.name COLLATE "C"), '{}') INTO also_locked
		FROM pg_locks l JOIN before b ON b.oid = l.relation
		WHERE l.pid = pg_backend_pid() AND l.mode = 'AccessExclusiveLock' AND b.relkind IN ('r', 'p') AND b.oid <> ALL (members);
		RAISE EXCEPTION 'rolled back' USING ERRCODE = 'RMX01';
	EXCEPTION
		WHEN SQLSTATE 'RMX01' THEN NULL;
		WHEN OTHERS THEN error := SQLERRM;
	END;
	DROP TABLE before;
END $$;

CREATE FUNCTION prove(relation text, col text, type text, expr text DEFAULT NULL,
	OUT change text, OUT rewrites boolean, OUT indexes_rebuilt text[], OUT scans text[], OUT also_locked text[],
	OUT method text, OUT agrees boolean)
LANGUAGE plpgsql AS $$
DECLARE
	a record;
	t record;
BEGIN
	SELECT * INTO a FROM rm_advise(relation, col, type, expr);
	SELECT * INTO t FROM truth(relation, col, type, expr);
	change := format('%s.%s %s%s', relation, col, type, ' USING ' || expr);
	rewrites := a.rewrites;
	indexes_rebuilt := ARRAY(SELECT replace(x, 'public.', '') FROM unnest(a.indexes_rebuilt) x ORDER BY x COLLATE "C");
	scans := ARRAY(SELECT replace(x, 'public.', '') FROM unnest(a.scans) x ORDER BY x COLLATE "C");
	also_locked := ARRAY(SELECT replace(x, 'public.', '') FROM unnest(a.also_locked) x ORDER BY x COLLATE "C");
	method := a.method;
	agrees := t.error IS NULL AND a.rewrites = t.rewrites
		AND ARRAY(SELECT unnest(a.indexes_rebuilt) COLLATE "C" ORDER BY 1) = t.indexes_rebuilt
		AND ARRAY(SELECT DISTINCT split_part(x, ':', 1) COLLATE "C" FROM unnest(a.scans) x ORDER BY 1) = t.tables_read
		AND ARRAY(SELECT unnest(a.also_locked) COLLATE "C" ORDER BY 1) = t.also_locked;
	IF NOT agrees THEN
		RAISE NOTICE 'but it is: %', t;
	END IF;
END $$;

-- 2. Types alone; the tables are large enough not to be small
CREATE DOMAIN plain_text AS text;
CREATE DOMAIN short_text AS text CHECK (length(VALUE) < 30);
CREATE TABLE kinds (
	gone int, id int, gone_too text,
	v varchar(50), vc varchar(50) CHECK (vc <> 'never'), vn varchar(50), nn varchar(50) NOT NULL, t text, tc text COLLATE "C",
	ts timestamp, ts3 timestamp(3), iv interval(3), o int, b bit(3), num numeric(10,2), anynum numeric, a varchar(10)[], j json,
	ex int4range, EXCLUDE USING gist (ex WITH &&), def text DEFAULT 'x'
);
ALTER TABLE kinds DROP COLUMN gone, DROP COLUMN gone_too;
ALTER TABLE kinds ADD COLUMN later int DEFAULT 7;
INSERT INTO kinds SELECT g, g, g, g, g, g, g, timestamp '2024-01-01' + g * interval '1 s', now(), interval '1 s', g, '101', g, g, ARRAY[g::text],
	'{}', CASE WHEN g < 100 THEN int4range(g, g + 1) END FROM generate_series(1, 10001) g;
ALTER TABLE kinds ADD CONSTRAINT vn_unproven CHECK (vn <> 'never') NOT VALID;
ANALYZE kinds;
SELECT p.* FROM (VALUES
	(1, 'v', 'varchar(50)', NULL), (2, 'v', 'varchar(100)', NULL), (3, 'v', 'varchar(20)', NULL), (4, 'v', 'varchar', NULL),
	(5, 'v', 'text', NULL), (6, 'v', 'text', 'upper(v)'), (7, 'v', 'text', 'v::text'), (8, 'v', 'int', 'v::int'),
	(10, 'vc', 'varchar(100)', NULL), (11, 'vc', 'text', NULL), (12, 'vc', 'varchar(20)', NULL), (13, 'vn', 'varchar(100)', NULL),
	(14, 'nn', 'text', NULL), (15, 'nn', 'varchar(100)', NULL), (16, 't', 'varchar', NULL), (17, 't', 'citext', NULL),
	(18, 'tc', 'text', NULL), (19, 't', 'plain_text', NULL), (20, 't', 'short_text', NULL), (21, 't', 'bytea', 't::bytea'),
	(30, 'ts', 'timestamptz', NULL), (31, 'ts3', 'timestamp', NULL), (32, 'ts3', 'timestamp(1)', NULL), (33, 'iv', 'interval', NULL),
	(40, 'o', 'oid', NULL), (41, 'o', 'bigint', NULL), (42, 'o', 'regclass', NULL), (43, 'b', 'varbit', NULL), (44, 'num', 'numeric(12,2)', NULL),
	(45, 'num', 'numeric(12,3)', NULL), (46, 'num', 'numeric', NULL), (47, 'anynum', 'numeric(10,2)', NULL), (48, 'a', 'varchar(20)[]', NULL),
	(49, 'a', 'text[]', NULL), (50, 'j', 'jsonb', NULL), (51, 'ex', 'int8range', 'int8range(lower(ex), upper(ex))'), (52, 'def', 'varchar', NULL),
	(53, 'later', 'oid', NULL)
) c (n, col, type, expr), LATERAL prove('kinds', col, type, expr) p ORDER BY n;

-- 3. The same with indexes
CREATE INDEX v_i ON kinds (v);
CREATE INDEX v_e ON kinds (upper(v));
CREATE INDEX v_p ON kinds (id) WHERE v <> 'none';
CREATE UNIQUE INDEX v_u ON kinds (nn) INCLUDE (v);
CREATE INDEX v_o ON kinds (v varchar_pattern_ops DESC);
CREATE INDEX ts_i ON kinds (ts);
CREATE INDEX ts_brin ON kinds USING brin (ts, v);
CREATE INDEX o_i ON kinds (o);
CREATE INDEX o_hash ON kinds USING hash (o);
CREATE INDEX t_i ON kinds (t);
CREATE INDEX tc_i ON kinds (tc);
CREATE INDEX b_i ON kinds (b);
CREATE INDEX num_i ON kinds (num);
CREATE INDEX a_i ON kinds USING gin (a);
ALTER TABLE kinds ADD PRIMARY KEY (id), ADD UNIQUE (v, id);
SELECT p.* FROM (VALUES
	(1, 'v', 'varchar(50)', NULL), (2, 'v', 'varchar(100)', NULL), (3, 'v', 'varchar(20)', NULL), (4, 'v', 'text', NULL), (5, 'nn', 'text', NULL),
	(6, 'ts', 'timestamptz', NULL), (7, 'o', 'oid', NULL), (8, 't', 'citext', NULL), (9, 't', 'varchar', NULL), (10, 'tc', 'text', NULL), (11, 'b', 'varbit', NULL),
	(12, 'num', 'numeric(12,2)', NULL), (13, 'a', 'text[]', NULL), (14, 't', 'plain_text', NULL), (15, 'id', 'oid', NULL),
	(16, 'id', 'bigint', NULL)
) c (n, col, type, expr), LATERAL prove('kinds', col, type, expr) p ORDER BY n;
-- an exclusion constraint reads its table once more, and not for the sake of another one
CREATE TABLE once (o int, p int CHECK (p > 0), EXCLUDE (o WITH =));
INSERT INTO once SELECT g, g FROM generate_series(1, 10001) g;
SELECT p.* FROM prove('once', 'o', 'oid') p;
ALTER TABLE once ADD CHECK (o <> 5000000);
SELECT p.* FROM prove('once', 'o', 'oid') p;
-- the settings decide
SET TimeZone = 'Europe/Berlin';
SELECT rewrites, method, agrees FROM prove('kinds', 'ts', 'timestamptz');
SET TimeZone = 'UTC';

-- 4. Foreign keys, on either side
CREATE TABLE city (code varchar(50) PRIMARY KEY, n int UNIQUE);
INSERT INTO city SELECT g, g FROM generate_series(1, 10001) g;
CREATE TABLE visit (id int PRIMARY KEY, city varchar(50) REFERENCES city, n int REFERENCES city (n), prev int CONSTRAINT prev_fk REFERENCES visit,
	c2 varchar(50), twice int);
INSERT INTO visit SELECT g, g, g, g, g, g FROM generate_series(1, 10001) g;
ALTER TABLE visit ADD CONSTRAINT unproven FOREIGN KEY (c2) REFERENCES city NOT VALID,
	ADD CONSTRAINT twice_a FOREIGN KEY (twice) REFERENCES city (n), ADD CONSTRAINT twice_b FOREIGN KEY (twice) REFERENCES visit;
ANALYZE city, visit;
SELECT p.* FROM (VALUES
	(1, 'visit', 'city', 'varchar(100)', NULL), (2, 'visit', 'city', 'text', NULL), (3, 'visit', 'city', 'varchar(20)', NULL), (4, 'visit', 'n', 'bigint', NULL),
	(5, 'visit', 'c2', 'text', NULL), (6, 'visit', 'prev', 'bigint', NULL), (7, 'visit', 'twice', 'bigint', NULL), (8, 'visit', 'id', 'bigint', NULL),
	(9, 'city', 'code', 'varchar(100)', NULL), (10, 'city', 'code', 'text', NULL), (11, 'city', 'n', 'bigint', NULL)
) c (n, rel, col, type, expr), LATERAL prove(rel, col, type, expr) p ORDER BY n;
-- a small table, and a large one that refers to it and would be read under the lock
CREATE TABLE few (id int PRIMARY KEY);
INSERT INTO few SELECT generate_series(1, 10);
CREATE TABLE many (few int REFERENCES few);
INSERT INTO many SELECT 1 FROM generate_series(1, 10001);
SELECT scans, method, agrees FROM prove('few', 'id', 'bigint');
SELECT method, agrees FROM prove('many', 'few', 'bigint');

-- 5. Partitions, which have things of their own, and children
CREATE TABLE parts (k int, v varchar(50), w varchar(50)) PARTITION BY LIST (k);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
CREATE TABLE parts_2 (w varchar(50) CHECK (w <> 'never'), v varchar(50), k int);
ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES IN (2);
CREATE INDEX ON parts (upper(w));
CREATE INDEX only_2 ON parts_2 (upper(v));
INSERT INTO parts SELECT 1 + g % 2, g, g FROM generate_series(1, 10001) g;
SELECT p.* FROM (VALUES (1, 'v', 'varchar(100)'), (2, 'w', 'varchar(100)'), (3, 'w', 'text'), (4, 'v', 'int')) c (n, col, type),
	LATERAL prove('parts', col, type, CASE type WHEN 'int' THEN 'v::int' END) p ORDER BY n;
SELECT reason, refusals FROM rm_advise('parts', 'k', 'bigint');
SELECT reason, refusals FROM rm_advise('parts_1', 'v', 'text');
CREATE TABLE parent (v varchar(50));
CREATE TABLE child (w int, CHECK (v <> 'never')) INHERITS (parent);
INSERT INTO child SELECT g, g FROM generate_series(1, 10001) g;
SELECT p.* FROM prove('parent', 'v', 'varchar(100)') p;
-- what ALTER TABLE changes in all that inherit it, three_step does; what it refuses, nobody does
SELECT method, reason, refusals FROM rm_advise('parent', 'v', 'int', 'v::int');
SELECT method, reason, refusals FROM rm_advise('child', 'v', 'text');
SELECT method FROM rm_advise('child', 'w', 'bigint');

-- 6. Small: by size and a count, never by an estimate
CREATE TABLE counted (v int) WITH (autovacuum_enabled = off);
INSERT INTO counted SELECT generate_series(1, 9999);
SELECT method, reason FROM rm_advise('counted', 'v', 'bigint');
UPDATE pg_class SET reltuples = 1e9, relpages = 1 WHERE oid = 'counted'::regclass;
SELECT method FROM rm_advise('counted', 'v', 'bigint');
INSERT INTO counted VALUES (0);
UPDATE pg_class SET reltuples = 1 WHERE oid = 'counted'::regclass;
SELECT method, reason FROM rm_advise('counted', 'v', 'bigint');
DELETE FROM counted WHERE v > 5;
SELECT method, reason FROM rm_advise('counted', 'v', 'bigint');
-- few rows, and much of each
CREATE TABLE heavy (v int, doc text);
ALTER TABLE heavy ALTER doc SET STORAGE EXTERNAL;
INSERT INTO heavy SELECT g, repeat('x', 1000000) FROM generate_series(1, 17) g;
SELECT method, reason FROM rm_advise('heavy', 'v', 'bigint');

-- nobody waits for a temporary table
CREATE TEMP TABLE own AS SELECT g AS v FROM generate_series(1, 10001) g;
SELECT method, reason FROM rm_advise('own', 'v', 'bigint');
DROP TABLE own;
-- 7. What is in the way of one method is not in the way of another
\pset format unaligned
CREATE TABLE watched (id int PRIMARY KEY, v varchar(50), w int, x text GENERATED ALWAYS AS (upper(v)) STORED);
CREATE VIEW watching AS SELECT w FROM watched;
SELECT method, reason, refusals FROM rm_advise('watched', 'w', 'bigint');
SELECT rewrites, method, reason, refusals FROM rm_advise('watched', 'v', 'text');
CREATE TYPE row_type AS (a int, b text);
CREATE TABLE typed OF row_type;
SELECT method, refusals FROM rm_advise('typed', 'a', 'bigint');
CREATE TABLE stored (w watched);
SELECT method, refusals FROM rm_advise('watched', 'id', 'bigint');
DROP TABLE stored;
CREATE TABLE whole (a int, b int, CHECK (whole IS NOT NULL));
SELECT rewrites, method, reason, refusals FROM rm_advise('whole', 'a', 'bigint');
CREATE TABLE bad_default (a text DEFAULT 'none');
SELECT rewrites, method, refusals FROM rm_advise('bad_default', 'a', 'int', 'a::int');
SELECT method, refusals FROM rm_advise('kinds', 'o', 'short_text', 'o::text');
CREATE TABLE keyless AS SELECT o FROM kinds;
SELECT method, refusals FROM rm_advise('keyless', 'o', 'short_text', 'o::text');

-- 8. auto does what was advised
SET client_min_messages = warning;
CALL rm_alter_type('watched', 'w', 'bigint', method => 'auto');
CALL rm_alter_type('counted', 'v', 'bigint', method => 'auto');
CALL rm_alter_type('kinds', 'nn', 'text', method => 'auto');
CALL rm_alter_type('visit', 'prev', 'bigint', method => 'auto');
CALL rm_alter_type('visit', 'prev', 'bigint', method => 'direct');
SELECT relation, method, method_reason, state FROM rm_migrations ORDER BY id DESC LIMIT 5;
SELECT attrelid::regclass, attname, atttypid::regtype FROM pg_attribute
WHERE attrelid IN ('watched'::regclass, 'counted'::regclass, 'kinds'::regclass, 'visit'::regclass) AND attname IN ('w', 'v', 'nn', 'prev') ORDER BY 1, 2;
-- direct is not chosen for what it cannot do
CALL rm_alter_type('counted', 'v', 'int', method => 'auto', cut_over => 'manual');
SELECT method, method_reason FROM rm_migrations ORDER BY id DESC LIMIT 1;
-- nothing is chosen for a column whose migration is open
SELECT method, regexp_replace(refusals::text, 'migration \d+', 'migration N', 'g') FROM rm_advise('counted', 'v', 'numeric');
CALL rm_rollback();
CALL rm_alter_type('counted', 'v', 'int', method => 'auto', on_error => 'null');
SELECT method, method_reason FROM rm_migrations ORDER BY id DESC LIMIT 1;
CALL rm_rollback();
-- a way back is asked for: of those who are not refused anyway only three_step has one
CALL rm_alter_type('visit', 'twice', 'bigint', method => 'auto', reverse_expr => 'twice::int');
SELECT method, method_reason FROM rm_migrations ORDER BY id DESC LIMIT 1;
CALL rm_rollback();
CALL rm_alter_type('visit', 'twice', 'bigint', method => 'online_rewrite', reverse_expr => 'twice::int');
RESET client_min_messages;
-- it says so
BEGIN;
SELECT rm_start('counted', 'v', 'numeric', method => 'auto') > 0;
ROLLBACK;
\set VERBOSITY default
CALL rm_alter_type('keyless', 'o', 'short_text', 'o::text', 'auto');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('bad_default', 'a', 'int', 'a::int', 'auto');
\echo SQLSTATE :SQLSTATE
\set VERBOSITY terse
\pset format aligned

-- 9. Nothing remains, and nothing but ACCESS SHARE was taken
SELECT max(id) AS before FROM rm_migrations \gset
BEGIN;
SELECT method FROM rm_advise('visit', 'id', 'numeric');
SELECT DISTINCT mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
WHERE l.pid = pg_backend_pid() AND c.relnamespace = 'public'::regnamespace;
SELECT method FROM rm_advise('parts', 'v', 'int', 'v::int');
SELECT DISTINCT mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
WHERE l.pid = pg_backend_pid() AND c.relnamespace = 'public'::regnamespace;
COMMIT;
SELECT relname FROM pg_class WHERE relname ~ '^rm_' AND relnamespace = 'public'::regnamespace AND relkind <> 'v';
SELECT typname FROM pg_type WHERE typname ~ '^_*rm_(twin|peer)';
SELECT count(*) FROM rm_migrations WHERE id > :before;
SHOW client_min_messages;
-- scans are counted whatever the settings
SET track_counts = off;
SELECT scans, method FROM rm_advise('kinds', 'vc', 'text');
SHOW track_counts;
RESET track_counts;

-- 10. Refused
\set VERBOSITY default
SELECT rm_advise(NULL, 'v', 'int');
SELECT rm_advise('counted', NULL, 'int');
SELECT rm_advise('counted', 'v', '');
SELECT rm_advise('no_such', 'v', 'int');
SELECT rm_advise('counted', 'no_such', 'int');
SELECT rm_advise('counted', 'v', 'no_such');
SELECT rm_advise('counted', 'v', 'date');
SELECT rm_advise('watching', 'w', 'int');
SELECT rm_advise('counted', 'v', 'int', 'v + random()');
BEGIN READ ONLY;
SELECT rm_advise('counted', 'v', 'int');
ROLLBACK;
CREATE ROLE rm_test_other;
SET ROLE rm_test_other;
SELECT rm_advise('public.counted', 'v', 'int');
RESET ROLE;
-- an owner who may make nothing in the schema
CREATE SCHEMA theirs;
CREATE TABLE theirs.t (v int);
ALTER TABLE theirs.t OWNER TO rm_test_other;
GRANT USAGE ON SCHEMA theirs TO rm_test_other;
SET ROLE rm_test_other;
SELECT rewrites, method, refusals FROM rm_advise('theirs.t', 'v', 'bigint');
RESET ROLE;
DROP SCHEMA theirs CASCADE;
DROP ROLE rm_test_other;
-- indexes are the owner's: their functions do not run with the rights of a superuser who asks
CREATE ROLE rm_test_owner;
GRANT CREATE ON SCHEMA public TO rm_test_owner;
CREATE FUNCTION who_runs() RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN 'x'; END $$;
CREATE TABLE trap (v int, w text);
CREATE INDEX ON trap ((w || who_runs()));
ALTER TABLE trap OWNER TO rm_test_owner;
CREATE OR REPLACE FUNCTION who_runs() RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
	IF current_user <> 'rm_test_owner' THEN RAISE EXCEPTION 'it runs as %', current_user; END IF; RETURN 'x'; END $$;
SELECT rewrites, method, reason, refusals FROM rm_advise('trap', 'v', 'bigint');
SELECT rewrites, method, reason, refusals FROM rm_advise('trap', 'w', 'varchar');
SET client_min_messages = warning;
CALL rm_add_column('trap', 'v', 'bigint');
CALL rm_rollback();
RESET client_min_messages;

SET client_min_messages = warning;
DROP TABLE trap, once, kinds, visit, city, many, few, parts, child, parent, counted, heavy, watched, typed, whole, bad_default CASCADE;
DROP FUNCTION who_runs(), truth, prove;
DROP TYPE row_type, plain_text, short_text;
REVOKE CREATE ON SCHEMA public FROM rm_test_owner;
DROP ROLE rm_test_owner;
DROP EXTENSION citext, btree_gist;
