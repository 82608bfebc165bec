-- three_step beyond the lab: other types, other keys, other settings, other
-- people's triggers, and the ground that moves in between.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;
CREATE ROLE regress_rm_owner;
CREATE ROLE regress_rm_other;
CREATE SCHEMA conv;
GRANT ALL ON SCHEMA conv TO regress_rm_owner, regress_rm_other;
SET search_path = conv, public;

-- what hangs on a table: columns, triggers, constraints, dependencies, storage
CREATE FUNCTION public.hangs_on(rel regclass) RETURNS text[] LANGUAGE sql AS $$
	SELECT array_agg(x.line ORDER BY x.line COLLATE "C") FROM (
		SELECT format('column %s %s %s %s', attnum, attname, format_type(atttypid, atttypmod), attnotnull)
		FROM pg_attribute WHERE attrelid = rel AND attnum > 0 AND NOT attisdropped
		UNION ALL SELECT format('trigger %s %s', tgname, tgenabled) FROM pg_trigger WHERE tgrelid = rel
		UNION ALL SELECT format('constraint %s %s', conname, pg_get_constraintdef(oid)) FROM pg_constraint WHERE conrelid = rel
		UNION ALL SELECT format('default %s', adnum) FROM pg_attrdef WHERE adrelid = rel
		UNION ALL SELECT format('index %s', pg_get_indexdef(indexrelid)) FROM pg_index WHERE indrelid = rel
		UNION ALL SELECT format('dependent %s %s %s', d.classid::regclass, d.refobjsubid, d.deptype)
		FROM pg_depend d WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = rel AND d.classid <> 'pg_constraint'::regclass
		UNION ALL SELECT format('depends on %s %s %s', d.refclassid::regclass, d.objsubid, d.deptype)
		FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = rel
	) x (line)
$$;
CREATE VIEW public.last AS SELECT steps_done, state, last_step, last_step_state, sqlstate
FROM rm_migrations ORDER BY id DESC LIMIT 1;

-- 1. int to bigint, without an expression; NULLs stay NULL in a nullable column
CREATE TABLE numbers (id int PRIMARY KEY, n int);
INSERT INTO numbers SELECT i, nullif(i % 10, 0) * 1000000 FROM generate_series(1, 500) i;
SELECT public.hangs_on('numbers') AS before \gset
CALL rm_add_column('numbers', 'n', 'bigint');
CALL rm_backfill_batched();
INSERT INTO numbers VALUES (501, NULL), (502, 2147483647);
CALL rm_enforce_not_null();
SELECT * FROM public.last;
SELECT count(*), count(n), count(n_new), count(*) FILTER (WHERE n_new IS DISTINCT FROM n) AS wrong,
	max(n_new), pg_typeof(max(n_new)) FROM numbers;
SELECT attnotnull FROM pg_attribute WHERE attrelid = 'numbers'::regclass AND attname = 'n_new';
-- each step again: done already, nothing happens
SELECT count(*) AS steps FROM risky_migrations.step_log \gset
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT count(*) - :steps AS more_steps FROM risky_migrations.step_log;
CALL rm_rollback();
SELECT public.hangs_on('numbers') = :'before' AS nothing_left;
SELECT max(id) AS id FROM rm_migrations \gset
CALL rm_rollback(:id);
SELECT * FROM public.last;
-- the same in a NOT NULL column
UPDATE numbers SET n = 0 WHERE n IS NULL;
ALTER TABLE numbers ALTER n SET NOT NULL;
CALL rm_add_column('numbers', 'n', 'bigint');
CALL rm_backfill_batched(100);
CALL rm_enforce_not_null();
SELECT attnotnull FROM pg_attribute WHERE attrelid = 'numbers'::regclass AND attname = 'n_new';
SELECT count(*), count(*) FILTER (WHERE n_new IS DISTINCT FROM n) AS wrong FROM numbers;
INSERT INTO numbers VALUES (503, NULL);
\echo SQLSTATE :SQLSTATE
DROP TABLE numbers CASCADE;
-- its table is gone: the migration can still be closed
SELECT max(id) AS id FROM rm_migrations \gset
CALL rm_rollback(:id);
SELECT * FROM public.last;

-- 2. The settings of the session that started it are in force everywhere
SET DateStyle = 'SQL, DMY';
SET TimeZone = 'Asia/Kathmandu';
CREATE TABLE days (id int PRIMARY KEY, d varchar(20) NOT NULL, t text NOT NULL);
INSERT INTO days SELECT i, '03/04/2024', '03/04/2024 12:00' FROM generate_series(1, 50) i;
CALL rm_add_column('days', 'd', 'date', 'd::date');
SELECT max(id) AS d FROM rm_migrations \gset
-- writers with other settings
SET DateStyle = 'ISO, MDY';
SET TimeZone = 'America/New_York';
INSERT INTO days SELECT i, '03/04/2024', '03/04/2024 12:00' FROM generate_series(51, 60) i;
UPDATE days SET d = '05/06/2024' WHERE id <= 5;
-- 13 is no month for them, but it is a day for the migration
INSERT INTO days VALUES (61, '13/04/2024', '13/04/2024 12:00');
-- the writer's own settings are back after the trigger
SELECT '03/04/2024'::date, current_setting('DateStyle'), current_setting('TimeZone');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT current_setting('DateStyle'), current_setting('TimeZone');
SELECT d, d_new, count(*) FROM days GROUP BY 1, 2 ORDER BY 1, 2;
CALL rm_rollback();
-- a time zone matters to timestamptz
SET DateStyle = 'SQL, DMY';
SET TimeZone = 'Asia/Kathmandu';
CALL rm_add_column('days', 't', 'timestamptz', 't::timestamptz');
SET DateStyle = 'ISO, MDY';
SET TimeZone = 'America/New_York';
UPDATE days SET id = id WHERE id % 2 = 0;
CALL rm_backfill_batched();
SET TimeZone = 'UTC';
SELECT t, t_new, count(*) FROM days GROUP BY 1, 2 ORDER BY 1, 2;
CALL rm_rollback();
RESET DateStyle;
RESET TimeZone;
DROP TABLE days;

-- 3. Several columns, and a function of one's own that a later search_path
-- would not find
CREATE FUNCTION conv.join_up(a int, b text, c text) RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT a || '/' || coalesce(b, '-') || '/' || c $$;
CREATE TABLE several (a int NOT NULL, b text, c text NOT NULL);
INSERT INTO several SELECT i, nullif(i % 3, 0), 'c' || i FROM generate_series(1, 30) i;
CALL rm_add_column('several', 'c', 'varchar(40)', 'join_up(a, b, c)');
SET search_path = public;
CALL rm_backfill_batched(7);
-- a change of any of them changes the new value
UPDATE conv.several SET b = 'B' WHERE a = 1;
UPDATE conv.several SET a = 1000 WHERE a = 2;
CALL rm_enforce_not_null();
SET search_path = conv, public;
SELECT count(*), count(*) FILTER (WHERE c_new IS DISTINCT FROM join_up(a, b, c)) AS wrong FROM several;
SELECT c_new FROM several WHERE a IN (1, 1000) ORDER BY 1;
-- the new type's length is enforced too: on the changed table this write would fail
UPDATE several SET c = repeat('x', 60) WHERE a = 1;
\echo SQLSTATE :SQLSTATE
-- the function and the columns cannot be dropped behind the migration's back
\set VERBOSITY sqlstate
DROP FUNCTION conv.join_up(int, text, text);
\set VERBOSITY default
\set VERBOSITY sqlstate
ALTER TABLE several DROP COLUMN b;
\set VERBOSITY default
CALL rm_rollback();
ALTER TABLE several DROP COLUMN b;
DROP FUNCTION conv.join_up(int, text, text);
DROP TABLE several;

-- 4. Values that do not convert are recorded, do not fail the write, and
-- stand in the way of enforcing
CREATE TABLE failing (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO failing SELECT i, CASE WHEN i % 50 = 0 THEN 'bad ' || i ELSE i::text END FROM generate_series(1, 200) i;
CALL rm_add_column('failing', 'v', 'int', 'v::int');
INSERT INTO failing VALUES (201, 'bad 201'), (202, '202');
CALL rm_backfill_batched(30);
SELECT count(*), count(v_new) FROM failing;
SELECT relation, column_name, row_key, value, sqlstate, message FROM rm_conversion_errors ORDER BY value;
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
SELECT * FROM public.last;
-- some are mended, one is deleted, one is written badly again
UPDATE failing SET v = id::text WHERE id IN (50, 100);
DELETE FROM failing WHERE id = 150;
UPDATE failing SET v = 'worse' WHERE id = 200;
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
-- now the records are of this verification only
SELECT row_key, value FROM rm_conversion_errors ORDER BY value;
UPDATE failing SET v = id::text WHERE id IN (200, 201);
CALL rm_enforce_not_null();
SELECT count(*) FROM rm_conversion_errors;
SELECT * FROM public.last;
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v::int) AS wrong FROM failing;
-- enforced: the write fails as it would on the changed table, and nothing is recorded
INSERT INTO failing VALUES (300, 'bad');
\echo SQLSTATE :SQLSTATE
SELECT count(*) FROM rm_conversion_errors;
CALL rm_rollback();
SELECT count(*) FROM rm_conversion_errors;
-- INSERT ... ON CONFLICT DO NOTHING: the row that never came does not stand in the way
CALL rm_add_column('failing', 'v', 'int', 'v::int');
INSERT INTO failing VALUES (1, 'not inserted') ON CONFLICT DO NOTHING;
BEGIN;
INSERT INTO failing VALUES (301, 'rolled back');
ROLLBACK;
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT * FROM public.last;
CALL rm_rollback();
-- in a nullable column too a value that does not convert is not lost silently
ALTER TABLE failing ALTER v DROP NOT NULL;
UPDATE failing SET v = 'bad' WHERE id = 7;
UPDATE failing SET v = NULL WHERE id = 8;
CALL rm_add_column('failing', 'v', 'int', 'v::int');
CALL rm_backfill_batched();
\set VERBOSITY sqlstate
CALL rm_enforce_not_null();
\set VERBOSITY default
SELECT steps_done, state FROM public.last;
UPDATE failing SET v = '7' WHERE id = 7;
CALL rm_enforce_not_null();
SELECT steps_done, state FROM public.last;
SELECT id, v, v_new FROM failing WHERE id IN (7, 8) ORDER BY id;
CALL rm_rollback();
DROP TABLE failing;
-- an expression that gives NULL where the old column has a value
CREATE TABLE nulling (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO nulling VALUES (1, '1'), (2, ''), (3, '3');
CALL rm_add_column('nulling', 'v', 'int', 'nullif(v, '''')::int');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
\echo SQLSTATE :SQLSTATE
-- which row it was is told
SELECT row_key FROM rm_conversion_errors;
UPDATE nulling SET v = '2' WHERE id = 2;
CALL rm_enforce_not_null();
SELECT id, v_new FROM nulling ORDER BY id;
UPDATE nulling SET v = '' WHERE id = 2;
\echo SQLSTATE :SQLSTATE
DROP TABLE nulling;

-- 5. Words of the clock are failures, whatever they are written in
CREATE TABLE clock (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO clock VALUES (1, '2024-01-01'), (2, 'now'), (3, 'TODAY'), (4, ' tomorrow '),
	(5, 'yesterday 10:00'), (6, 'allballs 2024-01-01'), (7, 'infinity'), (8, 'epoch');
CALL rm_add_column('clock', 'v', 'timestamp', 'v::timestamp');
CALL rm_backfill_batched();
SELECT id, v, v_new = v::timestamp AS same FROM clock WHERE v_new IS NOT NULL ORDER BY id;
SELECT row_key, value, sqlstate FROM rm_conversion_errors ORDER BY row_key;
CALL rm_rollback();
-- a string that is not read as a time may say what it likes
CALL rm_add_column('clock', 'v', 'varchar(30)', 'upper(v)');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT count(v_new) FROM clock;
CALL rm_rollback();
DROP TABLE clock;

-- 6. Names
CREATE TABLE "Mixed Case; DROP TABLE x" ("The ""Id""" int PRIMARY KEY, "Some Column" text NOT NULL);
INSERT INTO "Mixed Case; DROP TABLE x" SELECT i, i FROM generate_series(1, 10) i;
CALL rm_add_column('"Mixed Case; DROP TABLE x"', 'Some Column', 'int', '"Some Column"::int');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT count(*), count(*) FILTER (WHERE "Some Column_new" = "The ""Id""") AS right FROM "Mixed Case; DROP TABLE x";
SELECT relation, column_name, next_call FROM rm_migrations ORDER BY id DESC LIMIT 1;
CALL rm_rollback();
DROP TABLE "Mixed Case; DROP TABLE x";
-- 63 bytes, and cut in the middle of no character
CREATE TABLE aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffggg (
	"ääääääääääääääääääääääääääääääx" text NOT NULL,
	aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffgg1 text NOT NULL);
INSERT INTO aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffggg VALUES ('1', '2');
CALL rm_add_column('aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffggg', 'ääääääääääääääääääääääääääääääx', 'int', '"ääääääääääääääääääääääääääääääx"::int');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT attname, octet_length(attname) FROM pg_attribute
WHERE attrelid = 'aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffggg'::regclass AND attnum = 3;
CALL rm_rollback();
CALL rm_add_column('aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffggg', 'aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffgg1', 'int', 'aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffgg1::int');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT attname, octet_length(attname), attnotnull FROM pg_attribute
WHERE attrelid = 'aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffggg'::regclass AND attnum > 0 AND NOT attisdropped
ORDER BY attnum;
DROP TABLE aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffggg CASCADE;

-- 7. Keys: composite, text, none; batches of one row and of more than there are
CREATE TABLE composite (a int, b text, v text NOT NULL, PRIMARY KEY (b, a));
CREATE TABLE textual (k text PRIMARY KEY, v text NOT NULL);
CREATE TABLE keyless (v text NOT NULL);
INSERT INTO composite SELECT i, 'b' || i, CASE i WHEN 13 THEN 'x' ELSE i::text END FROM generate_series(1, 20) i;
INSERT INTO textual SELECT 'k' || i, CASE i WHEN 13 THEN 'x' ELSE i::text END FROM generate_series(1, 20) i;
INSERT INTO keyless SELECT CASE i WHEN 13 THEN 'x' ELSE i::text END FROM generate_series(1, 20) i;
CALL rm_add_column('composite', 'v', 'int', 'v::int');
SELECT max(id) AS id FROM rm_migrations \gset
CALL rm_backfill_batched(1, :id);
CALL rm_add_column('textual', 'v', 'int', 'v::int');
SELECT max(id) AS id FROM rm_migrations \gset
CALL rm_backfill_batched(10000000, :id);
CALL rm_add_column('keyless', 'v', 'int', 'v::int');
SELECT max(id) AS id FROM rm_migrations \gset
CALL rm_backfill_batched(6, :id);
SELECT relation, row_key, value FROM rm_conversion_errors ORDER BY relation;
-- never more than a batch in one transaction
SELECT relation, rows_changed, batches, transactions >= batches AS a_commit_for_each FROM risky_migrations.step_log
WHERE step = 'backfill' AND relation ~ 'composite|textual|keyless' ORDER BY relation;
SELECT (SELECT count(*) FROM composite WHERE v_new::text = v), (SELECT count(*) FROM textual WHERE v_new::text = v),
	(SELECT count(*) FROM keyless WHERE v_new::text = v);
DROP TABLE composite, textual, keyless CASCADE;

-- 8. Dropped columns, TOASTed values, fillfactor, more indexes
CREATE TABLE shape (gone1 text DEFAULT 'x', id int PRIMARY KEY, gone2 int, big text NOT NULL, v text NOT NULL)
	WITH (fillfactor = 50);
ALTER TABLE shape ALTER big SET STORAGE EXTERNAL;
INSERT INTO shape (id, gone2, big, v) SELECT i, i, repeat(md5(i::text), 200), i FROM generate_series(1, 100) i;
ALTER TABLE shape DROP COLUMN gone1, DROP COLUMN gone2;
CREATE INDEX ON shape (v);
CREATE INDEX ON shape (md5(big)) WHERE id % 2 = 0;
CREATE UNIQUE INDEX ON shape (v, id);
SELECT md5(string_agg(big || v, ',' ORDER BY id)) AS data FROM shape \gset
SELECT count(DISTINCT chunk_id) > 0 AS toasted FROM pg_class c, LATERAL (SELECT 1) x,
	LATERAL (SELECT pg_relation_size(c.reltoastrelid) AS chunk_id) y WHERE c.oid = 'shape'::regclass AND pg_relation_size(c.reltoastrelid) > 0;
CALL rm_add_column('shape', 'v', 'bigint', 'v::bigint');
CALL rm_backfill_batched(10);
CALL rm_enforce_not_null();
SELECT md5(string_agg(big || v, ',' ORDER BY id)) = :'data' AS same_data,
	count(*) FILTER (WHERE v_new IS DISTINCT FROM id) AS wrong FROM shape;
-- the indexes know every row
SET enable_seqscan = off;
SELECT count(*) FROM shape WHERE v BETWEEN '1' AND '99';
SELECT count(*) FROM shape WHERE id BETWEEN 1 AND 1000;
SELECT count(*) FROM shape s WHERE id % 2 = 0 AND md5(big) IN (SELECT md5(repeat(md5(i::text), 200)) FROM generate_series(1, 100) i);
RESET enable_seqscan;
-- a TOASTed value can be the one that is converted
CALL rm_rollback();
CALL rm_add_column('shape', 'big', 'bytea', 'convert_to(big, ''UTF8'')');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT count(*) FILTER (WHERE big_new IS DISTINCT FROM convert_to(big, 'UTF8')) AS wrong, min(octet_length(big_new)) FROM shape;
CALL rm_rollback();
DROP TABLE shape;

-- 9. Everything that writes, between the steps
CREATE TABLE written (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO written SELECT i, i FROM generate_series(1, 100) i;
CALL rm_add_column('written', 'v', 'int', 'v::int');
UPDATE written SET v = '1000' WHERE id = 1;
DELETE FROM written WHERE id = 2;
INSERT INTO written VALUES (101, '101');
UPDATE written SET id = 1002 WHERE id = 3;
COPY written (id, v) FROM STDIN;
102	102
103	103
\.
INSERT INTO written VALUES (4, '4000') ON CONFLICT (id) DO UPDATE SET v = excluded.v;
INSERT INTO written VALUES (5, 'never') ON CONFLICT DO NOTHING;
-- the column belongs to the trigger: what is written into it by hand is overwritten
INSERT INTO written VALUES (104, '104', -1);
UPDATE written SET v_new = -2 WHERE id = 6;
WITH moved AS (DELETE FROM written WHERE id = 7 RETURNING v) INSERT INTO written SELECT 107, v FROM moved;
CALL rm_backfill_batched(10);
UPDATE written SET v = '5000' WHERE id = 8;
UPDATE written SET v_new = NULL WHERE id = 9;
DELETE FROM written WHERE id = 10;
INSERT INTO written VALUES (110, '110');
BEGIN;
UPDATE written SET v = 'rolled back';
ROLLBACK;
BEGIN;
SAVEPOINT a;
UPDATE written SET v = '6000' WHERE id = 11;
ROLLBACK TO a;
UPDATE written SET v = '6001' WHERE id = 12;
COMMIT;
CALL rm_enforce_not_null();
UPDATE written SET v = '7000' WHERE id = 13;
MERGE INTO written w USING (VALUES (14, '8000'), (120, '120')) n (id, v) ON w.id = n.id
WHEN MATCHED THEN UPDATE SET v = n.v WHEN NOT MATCHED THEN INSERT VALUES (n.id, n.v);
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v::int) AS wrong FROM written;
-- ENABLE ALWAYS: also what replication applies
SET session_replication_role = replica;
UPDATE written SET v = '9000' WHERE id = 15;
RESET session_replication_role;
SELECT v_new FROM written WHERE id = 15;
DROP TABLE written;

-- 10. Other people's triggers, rules and policies
CREATE TABLE crowded (id int PRIMARY KEY, v text NOT NULL, touched int NOT NULL DEFAULT 0);
CREATE TABLE fired (what text);
CREATE FUNCTION conv.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
	INSERT INTO conv.fired VALUES (TG_NAME || ' ' || TG_OP);
	IF TG_WHEN = 'BEFORE' AND TG_LEVEL = 'ROW' THEN NEW.touched := NEW.touched + 1; RETURN NEW; END IF;
	RETURN NULL;
END $$;
CREATE FUNCTION conv.tenfold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.v := NEW.v || '0'; RETURN NEW; END $$;
INSERT INTO crowded SELECT i, i FROM generate_series(1, 20) i;
CREATE TRIGGER a_before BEFORE INSERT OR UPDATE ON crowded FOR EACH ROW EXECUTE FUNCTION conv.note();
CREATE TRIGGER b_after AFTER INSERT OR UPDATE ON crowded FOR EACH ROW EXECUTE FUNCTION conv.note();
CREATE TRIGGER c_statement AFTER INSERT OR UPDATE ON crowded FOR EACH STATEMENT EXECUTE FUNCTION conv.note();
CREATE TRIGGER d_always AFTER UPDATE ON crowded FOR EACH ROW EXECUTE FUNCTION conv.note();
ALTER TABLE crowded ENABLE ALWAYS TRIGGER d_always;
-- changes the source column; it sorts last of all names of letters
CREATE TRIGGER zzzzzz BEFORE INSERT OR UPDATE ON crowded FOR EACH ROW EXECUTE FUNCTION conv.tenfold();
CREATE RULE no_update AS ON UPDATE TO crowded WHERE old.id = 1 DO INSTEAD NOTHING;
ALTER TABLE crowded OWNER TO regress_rm_owner;
ALTER TABLE crowded ENABLE ROW LEVEL SECURITY;
ALTER TABLE crowded FORCE ROW LEVEL SECURITY;
CREATE POLICY half ON crowded USING (id % 2 = 0);
SET ROLE regress_rm_owner;
SELECT count(*) AS owner_sees FROM crowded;
CALL rm_add_column('crowded', 'v', 'int', 'v::int');
CALL rm_backfill_batched(3);
CALL rm_enforce_not_null();
RESET ROLE;
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v::int) AS wrong, sum(touched) AS touched FROM crowded;
SELECT count(*) AS fired FROM fired;
-- the user's write fires them as ever, and the sync trigger sees what they made of it
UPDATE crowded SET v = '7' WHERE id = 7;
SELECT id, v, v_new, touched FROM crowded WHERE id = 7;
SELECT what FROM fired ORDER BY what;
SET ROLE regress_rm_owner;
CALL rm_rollback();
RESET ROLE;
DROP TABLE crowded, fired CASCADE;

-- 11. Whose functions are called as whom
-- an index expression and a conversion that tell who evaluates them
CREATE FUNCTION conv.spy(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN $1 || ' ' || current_user; END $$;
CREATE FUNCTION conv.convert_it(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN $1 || ' by ' || current_user; END $$;
CREATE TABLE owned (id int PRIMARY KEY, v text NOT NULL);
ALTER TABLE owned OWNER TO regress_rm_owner;
ALTER FUNCTION conv.spy(text) OWNER TO regress_rm_owner;
INSERT INTO owned SELECT i, i FROM generate_series(1, 2000) i;
CREATE INDEX owned_spy ON owned (conv.spy(v));
GRANT ALL ON owned TO regress_rm_other;
-- the superuser starts and runs it, another role writes: always the owner's rights
CALL rm_add_column('owned', 'v', 'text', 'convert_it(v)');
SET ROLE regress_rm_other;
INSERT INTO owned VALUES (2001, '2001');
UPDATE owned SET v = '1' WHERE id = 1;
RESET ROLE;
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT replace(v_new, v, 'v'), count(*) FROM owned GROUP BY 1;
-- the pages were full, so the backfill made index entries: as the owner, not as the superuser
SELECT rows_changed - rows_hot > 100 AS made_entries FROM risky_migrations.step_log
WHERE step = 'backfill' AND relation = 'conv.owned';
SET enable_seqscan = off;
SELECT count(*) FROM owned WHERE conv.spy(v) IN (SELECT i || ' regress_rm_owner' FROM generate_series(2, 2000) i);
RESET enable_seqscan;
-- the conversion may not reach out of its restriction
CREATE OR REPLACE FUNCTION conv.convert_it(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN PERFORM set_config('role', 'regress_rm_other', false); RETURN $1; END $$;
\set VERBOSITY sqlstate
UPDATE owned SET v = '2' WHERE id = 2;
\set VERBOSITY default
SELECT current_user = session_user AS still_myself;
DROP TABLE owned;
DROP FUNCTION conv.spy(text), conv.convert_it(text);

-- 12. Back from every state, and nothing is left
CREATE TABLE residue (id int PRIMARY KEY, v text NOT NULL CHECK (v IS NOT NULL));
INSERT INTO residue SELECT i, i FROM generate_series(1, 100) i;
CREATE VIEW over_residue AS SELECT * FROM residue;
SELECT public.hangs_on('residue') AS before, pg_relation_filenode('residue') AS file \gset
CALL rm_add_column('residue', 'v', 'int', 'v::int');
CALL rm_rollback();
SELECT public.hangs_on('residue') = :'before' AS after_1;
CALL rm_add_column('residue', 'v', 'int', 'v::int');
CALL rm_backfill_batched();
CALL rm_rollback();
SELECT public.hangs_on('residue') = :'before' AS after_2;
CALL rm_add_column('residue', 'v', 'int', 'v::int');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
CALL rm_rollback();
SELECT public.hangs_on('residue') = :'before' AS after_3;
-- of a step 3 that was refused
UPDATE residue SET v = 'bad' WHERE id = 5;
CALL rm_add_column('residue', 'v', 'int', 'v::int');
CALL rm_backfill_batched();
\set VERBOSITY sqlstate
CALL rm_enforce_not_null();
\set VERBOSITY default
CALL rm_rollback();
SELECT public.hangs_on('residue') = :'before' AS after_refusal;
SELECT pg_relation_filenode('residue') = :file AS same_file, (SELECT count(*) FROM residue) AS rows;
-- what the extension wrote down about rows is gone with it
SELECT (SELECT count(*) FROM risky_migrations.skipped_row) AS skipped,
	(SELECT count(*) FROM risky_migrations.conversion_error WHERE migration_id = (SELECT max(id) FROM rm_migrations)) AS errors;
UPDATE residue SET v = '5' WHERE id = 5;

-- 13. The ground moves
-- VACUUM FULL: pages have other numbers
CALL rm_add_column('residue', 'v', 'int', 'v::int');
DELETE FROM residue WHERE id % 3 = 0;
VACUUM FULL residue;
CALL rm_backfill_batched(10);
VACUUM FULL residue;
CALL rm_enforce_not_null();
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v::int) AS wrong FROM residue;
CALL rm_rollback();
-- TRUNCATE, before and after the backfill
CALL rm_add_column('residue', 'v', 'int', 'v::int');
TRUNCATE residue;
INSERT INTO residue SELECT i, i FROM generate_series(1, 10) i;
CALL rm_backfill_batched();
TRUNCATE residue;
CALL rm_enforce_not_null();
INSERT INTO residue SELECT i, i FROM generate_series(1, 10) i;
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v::int) AS wrong FROM residue;
CALL rm_rollback();
-- the sync trigger is switched off, or comes back as an ordinary one
CALL rm_add_column('residue', 'v', 'int', 'v::int');
ALTER TABLE residue DISABLE TRIGGER USER;
UPDATE residue SET v = '100' WHERE id = 1;
SELECT max(id) AS id FROM rm_migrations \gset
\set VERBOSITY sqlstate
CALL rm_backfill_batched();
\set VERBOSITY default
ALTER TABLE residue ENABLE TRIGGER USER;
\set VERBOSITY sqlstate
CALL rm_backfill_batched();
\set VERBOSITY default
SELECT detail ~ 'is not enabled ALWAYS any more' AS told_why FROM rm_migrations ORDER BY id DESC LIMIT 1;
SELECT * FROM public.last;
-- put right again: goes on, and no write of the meantime is lost
SELECT format('ALTER TABLE residue ENABLE ALWAYS TRIGGER %I', '~rm_sync_' || :id) AS enable \gset
:enable;
CALL rm_backfill_batched();
ALTER TABLE residue DISABLE TRIGGER USER;
UPDATE residue SET v = '200' WHERE id = 2;
INSERT INTO residue VALUES (11, '11');
:enable;
CALL rm_enforce_not_null();
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v::int) AS wrong FROM residue;
CALL rm_rollback();
-- the same in a column that allows NULL
ALTER TABLE residue ALTER v DROP NOT NULL;
CALL rm_add_column('residue', 'v', 'int', 'v::int');
CALL rm_backfill_batched();
SELECT format('ALTER TABLE residue ENABLE ALWAYS TRIGGER %I', '~rm_sync_' || max(id)) AS enable FROM rm_migrations \gset
ALTER TABLE residue DISABLE TRIGGER USER;
UPDATE residue SET v = '300' WHERE id = 3;
INSERT INTO residue VALUES (12, '12');
:enable;
CALL rm_enforce_not_null();
SELECT count(*), count(*) FILTER (WHERE v_new IS DISTINCT FROM v::int) AS wrong FROM residue;
CALL rm_rollback();
ALTER TABLE residue ALTER v SET NOT NULL;
-- the trigger is dropped
CALL rm_add_column('residue', 'v', 'int', 'v::int');
SELECT format('DROP TRIGGER %I ON residue', '~rm_sync_' || max(id)) AS drop_it FROM rm_migrations \gset
:drop_it;
\set VERBOSITY sqlstate
CALL rm_backfill_batched();
\set VERBOSITY default
CALL rm_rollback();
-- a trigger comes that fires later
CALL rm_add_column('residue', 'v', 'int', 'v::int');
CREATE TRIGGER "~zz" BEFORE UPDATE ON residue FOR EACH ROW EXECUTE FUNCTION conv.tenfold();
\set VERBOSITY sqlstate
CALL rm_backfill_batched();
\set VERBOSITY default
DROP TRIGGER "~zz" ON residue;
CALL rm_backfill_batched();
CALL rm_rollback();
-- the shadow column is dropped: refused while the trigger is there, and with CASCADE noticed
CALL rm_add_column('residue', 'v', 'int', 'v::int');
\set VERBOSITY sqlstate
ALTER TABLE residue DROP COLUMN v_new;
\set VERBOSITY default
\set VERBOSITY sqlstate
ALTER TABLE residue ALTER COLUMN v TYPE varchar(10);
\set VERBOSITY default
ALTER TABLE residue DROP COLUMN v_new CASCADE;
INSERT INTO residue VALUES (13, '13');
\set VERBOSITY sqlstate
CALL rm_backfill_batched();
\set VERBOSITY default
CALL rm_rollback();
SELECT * FROM public.last;
SELECT public.hangs_on('residue') = :'before' AS nothing_left;
-- columns and table are renamed: names do not matter
CALL rm_add_column('residue', 'v', 'int', 'v::int');
ALTER TABLE residue RENAME COLUMN v TO w;
ALTER TABLE residue RENAME COLUMN v_new TO w_new;
ALTER TABLE residue RENAME TO moved;
ALTER TABLE moved SET SCHEMA public;
INSERT INTO moved VALUES (14, '14');
CALL rm_backfill_batched();
CALL rm_enforce_not_null();
SELECT count(*), count(*) FILTER (WHERE w_new IS DISTINCT FROM w::int) AS wrong FROM moved;
CALL rm_rollback();
ALTER TABLE moved SET SCHEMA conv;
ALTER TABLE moved RENAME TO residue;
ALTER TABLE residue RENAME COLUMN w TO v;
SELECT public.hangs_on('residue') = :'before' AS nothing_left;
-- the old column is dropped with all that hangs on it
CALL rm_add_column('residue', 'v', 'int', 'v::int');
SELECT max(id) AS id FROM rm_migrations \gset
\set VERBOSITY sqlstate
ALTER TABLE residue DROP COLUMN v;
\set VERBOSITY default
ALTER TABLE residue DROP COLUMN v CASCADE;
INSERT INTO residue VALUES (15);
\set VERBOSITY sqlstate
CALL rm_backfill_batched();
\set VERBOSITY default
CALL rm_rollback();
SELECT attname FROM pg_attribute WHERE attrelid = 'residue'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum;
-- the table is dropped
CREATE TABLE short_lived (v text NOT NULL);
CALL rm_add_column('short_lived', 'v', 'int', 'v::int');
SELECT max(id) AS id FROM rm_migrations \gset
DROP TABLE short_lived;
\set VERBOSITY sqlstate
CALL rm_backfill_batched();
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_backfill_batched(10, :id);
\set VERBOSITY default
\set VERBOSITY sqlstate
CALL rm_enforce_not_null(:id);
\set VERBOSITY default
CALL rm_rollback(:id);
SELECT * FROM public.last;

-- 14. A trigger that outlived its migration (a restored dump) leaves rows alone
CREATE TABLE restored (v text NOT NULL, v_new int);
CREATE TRIGGER "~rm_sync_4711" BEFORE INSERT OR UPDATE ON restored FOR EACH ROW EXECUTE FUNCTION risky_migrations.sync('4711');
INSERT INTO restored VALUES ('1', 5) RETURNING *;
DROP TABLE restored;

-- 15. What adding a column does to others by itself: the price of three_step
CREATE TABLE price (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO price VALUES (1, '1');
PREPARE everything AS SELECT * FROM price;
PREPARE returning_all AS UPDATE price SET id = id RETURNING *;
PREPARE named AS SELECT id, v FROM price;
EXECUTE everything;
EXECUTE returning_all;
EXECUTE named;
CALL rm_add_column('price', 'v', 'int', 'v::int');
\set VERBOSITY sqlstate
EXECUTE everything;
\set VERBOSITY default
\set VERBOSITY sqlstate
EXECUTE returning_all;
\set VERBOSITY default
EXECUTE named;
\set VERBOSITY sqlstate
COPY price FROM STDIN;
2	2
\.
\set VERBOSITY default
COPY price (id, v) FROM STDIN;
2	2
\.
COPY price TO STDOUT;
INSERT INTO price VALUES (3, '3');
CALL rm_rollback();
EXECUTE everything;
DEALLOCATE ALL;
DROP TABLE price;

-- 16. Looking beforehand: the rows that fail, up to a limit, and how many fail
-- likewise; with no lock but ACCESS SHARE, and it can be cancelled
CREATE TABLE checked (id int, part int, v text, PRIMARY KEY (part, id));
INSERT INTO checked SELECT i, i % 2, CASE WHEN i % 100 = 0 THEN 'bad ' || i WHEN i % 250 = 7 THEN i || '000000000'
	WHEN i % 10 <> 3 THEN i::text END FROM generate_series(1, 1000) i;
SELECT * FROM rm_check_conversion('checked', 'v', 'int', 'v::int', 3);
SELECT sqlstate, count(*), min(rows_like_it), max(rows_like_it) FROM rm_check_conversion('checked', 'v', 'int', 'v::int') GROUP BY 1 ORDER BY 1;
BEGIN;
SELECT count(*) FROM rm_check_conversion('checked', 'v', 'int', 'v::int');
SELECT DISTINCT mode FROM pg_locks WHERE pid = pg_backend_pid() AND relation IN ('checked'::regclass, 'checked_pkey'::regclass);
ROLLBACK;
CREATE FUNCTION conv.slowly(text) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN PERFORM pg_sleep(0.1); RETURN 1; END $$;
SET statement_timeout = '200 ms';
\set VERBOSITY sqlstate
SELECT * FROM rm_check_conversion('checked', 'v', 'int', 'conv.slowly(v)');
\set VERBOSITY default
RESET statement_timeout;
DROP FUNCTION conv.slowly;
DROP TABLE checked;

-- 17. Tables of the same name, with all that is on them, in several schemas
CREATE SCHEMA conv_a;
CREATE SCHEMA conv_b;
CREATE SCHEMA "conv.c";
DO $$
DECLARE s text;
BEGIN
	FOREACH s IN ARRAY '{conv_a,conv_b,conv.c}'::text[] LOOP
		EXECUTE format('SET search_path = %I', s);
		CREATE TABLE item (id serial PRIMARY KEY, v int NOT NULL UNIQUE CHECK (v > 0), parent int REFERENCES item (v));
		INSERT INTO item (v) SELECT g * CASE s WHEN 'conv_a' THEN 1 WHEN 'conv_b' THEN 10 ELSE 100 END FROM pg_catalog.generate_series(1, 100) g;
		CREATE VIEW item_view AS SELECT v FROM item;
	END LOOP;
END $$;
SET search_path = conv_b, public;
CALL rm_add_column('item', 'v', 'bigint');
CALL rm_add_column('conv_a.item', 'v', 'bigint');
CALL rm_add_column('"conv.c".item', 'v', 'bigint');
SELECT max(id) AS c FROM rm_migrations \gset
INSERT INTO item (v) VALUES (7);
INSERT INTO conv_a.item (v) VALUES (777);
INSERT INTO "conv.c".item (v) VALUES (7777);
SELECT rm_resume(id) = id AS it FROM rm_migrations WHERE id > :c - 3 ORDER BY id;
DO $$ BEGIN
	FOR i IN 1 .. 6000 LOOP
		COMMIT;
		EXIT WHEN 3 = (SELECT count(*) FROM rm_migrations WHERE state = 'open' AND steps_done = 5 AND running_pid IS NULL);
		PERFORM pg_sleep(0.01);
	END LOOP;
END $$;
SELECT relation, steps_done, last_step_state FROM rm_migrations WHERE id > :c - 3 ORDER BY id;
CALL rm_rollback(:c - 2);
CALL rm_cleanup(:c - 1);
CALL rm_cleanup(:c);
SELECT pg_typeof(v), count(*), sum(v) FROM conv_a.item_view GROUP BY 1;
SELECT pg_typeof(v), count(*), sum(v) FROM conv_b.item_view GROUP BY 1;
SELECT pg_typeof(v), count(*), sum(v) FROM "conv.c".item_view GROUP BY 1;
SELECT conrelid::regclass AS "table", conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid::regclass::text ~ 'item$' AND contype <> 'n' ORDER BY conrelid::regclass::text COLLATE "C", conname;
SET search_path = conv, public;
SET client_min_messages = error;
DROP SCHEMA conv_a, conv_b, "conv.c" CASCADE;
SET client_min_messages = warning;

-- 18. Composite types, arrays of them, domains over arrays
CREATE TYPE conv.pair AS (a int, b text);
CREATE DOMAIN conv.numbers AS int[];
CREATE TABLE typed (id int PRIMARY KEY, v conv.pair NOT NULL);
INSERT INTO typed SELECT g, row(g, 'it''s "' || g)::conv.pair FROM generate_series(1, 50) g;
CREATE INDEX ON typed (v);
CREATE FUNCTION conv.as_is() RETURNS TABLE (type text, md5 text) LANGUAGE sql AS $$
	SELECT (SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'conv.typed'::regclass AND attname = 'v'),
		md5(string_agg(to_jsonb(t.v)::text, ',' ORDER BY id)) FROM conv.typed t $$;
SELECT * FROM conv.as_is();
CALL rm_alter_type('typed', 'v', 'text', 'v::text', reverse_expr => 'v::conv.pair');
UPDATE typed SET v = '(7,seven)' WHERE id = 7;
UPDATE typed SET v = '(7,"it''s ""7")' WHERE id = 7;
CALL rm_rollback();
SELECT * FROM conv.as_is();
CALL rm_alter_type('typed', 'v', 'conv.pair[]', 'ARRAY[v, NULL]', reverse_expr => 'v[1]');
SELECT v FROM typed WHERE id = 7;
CALL rm_rollback();
SELECT * FROM conv.as_is();
CALL rm_alter_type('typed', 'v', 'conv.numbers', 'ARRAY[(v).a, id]');
CALL rm_cleanup();
CALL rm_alter_type('typed', 'v', 'bigint[]');
CALL rm_cleanup();
SELECT type FROM conv.as_is();
SELECT v FROM typed WHERE id = 7;
DROP TABLE typed;
DROP TYPE conv.pair;
DROP DOMAIN conv.numbers;

-- DROP EXTENSION takes the sync triggers along only with CASCADE
CREATE TABLE last_one (v text NOT NULL);
CALL rm_add_column('last_one', 'v', 'int', 'v::int');
\set VERBOSITY sqlstate
DROP EXTENSION risky_migrations;
\set VERBOSITY default
DROP EXTENSION risky_migrations CASCADE;
INSERT INTO last_one VALUES ('x') RETURNING v;
SET search_path = public;
DROP SCHEMA conv CASCADE;
DROP FUNCTION hangs_on;
DROP ROLE regress_rm_owner, regress_rm_other;
