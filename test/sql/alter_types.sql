-- Several columns at once, none at all, and another collation.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;

-- two tables of the same statements: one is changed by ALTER TABLE
SET client_min_messages = notice;
CREATE SCHEMA twin;
CREATE FUNCTION make(schema text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('SET LOCAL search_path = %I, public', schema);
	CREATE TABLE item (
		id int, part varchar(10), at varchar(30) NOT NULL, n int CHECK (n > 0), word text DEFAULT 'none', gone int,
		PRIMARY KEY (part, id), CHECK (n < 1000000 OR id > 0));
	ALTER TABLE item DROP COLUMN gone;
	CREATE INDEX item_at ON item (at);
	CREATE INDEX item_both ON item (n, word);
	CREATE UNIQUE INDEX item_sum ON item ((n + id), part);
	CREATE STATISTICS item_st ON n, word FROM item;
	INSERT INTO item SELECT i, 'p' || i % 3, to_char(timestamp '2024-01-01' + i * interval '1 minute', 'YYYY-MM-DD HH24:MI'),
		i, CASE WHEN i % 7 > 0 THEN 'w' || i END FROM generate_series(1, 2000) i;
	DELETE FROM item WHERE id % 2 = 0;
END $$;
SELECT make('public'), make('twin');

-- what hangs on one of them, on two, on what hangs on one
CREATE VIEW early AS SELECT id, at FROM item WHERE id < 100;
CREATE VIEW both_of AS SELECT e.at, i.n, i.word FROM early e JOIN item i USING (id);
COMMENT ON VIEW both_of IS 'of two columns, by way of another view';
CREATE POLICY p_some ON item USING (n > id);
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER of_two AFTER UPDATE OF at, n ON item FOR EACH ROW EXECUTE FUNCTION nothing();
CREATE TABLE child (part varchar(10), id int, FOREIGN KEY (part, id) REFERENCES item);
INSERT INTO child SELECT part, id FROM item LIMIT 5;

CALL rm_alter_types('item', $${
	"id": "bigint", "part": {"type": "text", "using": "upper(part)"},
	"at": {"type": "timestamp", "using": "at::timestamp"},
	"n": {"type": "bigint", "using": "n + id"}, "word": "text COLLATE \"C\""}$$, method => 'online_rewrite');
-- the key is referred to: its new values have no rows there
UPDATE child SET part = upper(part);
SELECT rm_resume();
DO $$BEGIN
	FOR i IN 1 .. 10000 LOOP
		EXIT WHEN (SELECT state FROM rm_migrations WHERE id = 1) = 'done';
		PERFORM pg_sleep(0.01);
	END LOOP;
END$$;
ALTER TABLE twin.item ALTER id TYPE bigint, ALTER part TYPE text USING upper(part),
	ALTER at TYPE timestamp USING at::timestamp, ALTER n TYPE bigint USING n + id, ALTER word TYPE text COLLATE "C";
SELECT count(*) FROM (TABLE item EXCEPT ALL TABLE twin.item) x;
SELECT count(*) FROM (TABLE twin.item EXCEPT ALL TABLE item) x;
\d item
\d+ both_of
SELECT count(*), min(at), max(n) FROM both_of;
SELECT column_name, old_type, new_type, using_expr, method, state FROM rm_migrations;
SELECT count(*) FROM pg_class WHERE relnamespace = 'risky_migrations'::regnamespace AND relname ~ '^(shadow|log)_';
DROP TABLE child;

-- none: the table is only written anew, and no smaller one than VACUUM FULL makes
DELETE FROM item WHERE id % 4 = 1;
DELETE FROM twin.item WHERE id % 4 = 1;
CALL rm_alter_types('item', '{}');
VACUUM FULL twin.item;
SELECT pg_relation_size('item') = pg_relation_size('twin.item') AS as_small, count(*) FROM item;
SELECT count(*) FROM (TABLE item EXCEPT ALL TABLE twin.item) x;
SELECT column_name, new_type, method, method_reason, state FROM rm_migrations WHERE id = 2;

-- by ALTER TABLE, with all clauses in one
DROP VIEW both_of, early;
DROP TRIGGER of_two ON item;
DROP POLICY p_some ON item;
SET client_min_messages = warning;
CALL rm_alter_types('item', '{"n": "int", "at": {"type": "date", "using": "at::date"}}', 'direct');
CALL rm_alter_types('item', '{"n": "bigint", "part": {"type": "int", "using": "part::int"}}', 'direct');
\echo SQLSTATE :SQLSTATE
-- which says of the whole what it would say of each
CALL rm_alter_types('item', '{"n": "text", "at": "timestamp"}');
SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'item'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum;

-- values that do not convert: told with their column
CALL rm_alter_types('item', '{"part": {"type": "int", "using": "part::int"}, "n": "bigint"}', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
SELECT message, count(*) > 100 AS many FROM (SELECT regexp_replace(message, '".*"$', '...') AS message FROM rm_conversion_errors) e GROUP BY 1 ORDER BY 1;
CALL rm_rollback();

-- also those that only the last round meets; what has been mended is no longer told
CREATE TABLE late (id varchar(10) PRIMARY KEY, a text, b text);
INSERT INTO late SELECT i, i, i FROM generate_series(1, 100) i;
CALL rm_alter_types('late', '{"id": {"type": "int", "using": "id::int"}, "a": {"type": "int", "using": "a::int"},
	"b": {"type": "int", "using": "b::int"}}', 'online_rewrite', cut_over => 'manual');
UPDATE late SET a = 'bad', b = 'worse' WHERE id = '7';
UPDATE late SET b = 'bad' WHERE id = '8';
CALL rm_cut_over();
\echo SQLSTATE :SQLSTATE
SELECT row_key, value, message FROM rm_conversion_errors WHERE relation = 'public.late' ORDER BY 1;
UPDATE late SET a = '70' WHERE id = '7';
UPDATE late SET b = '80' WHERE id = '8';
CALL rm_cut_over();
SELECT row_key, value, message FROM rm_conversion_errors WHERE relation = 'public.late' ORDER BY 1;
UPDATE late SET b = '71' WHERE id = '7';
CALL rm_cut_over();
SELECT count(*) FROM rm_conversion_errors WHERE relation = 'public.late';
SELECT pg_typeof(id), pg_typeof(a), pg_typeof(b), * FROM late WHERE id IN (7, 8) ORDER BY id;
-- by ALTER TABLE, told with the row that it stopped at, though another would fail in another column
ALTER TABLE late ALTER id TYPE text, ALTER a TYPE text, ALTER b TYPE text;
UPDATE late SET b = 'bad' WHERE id = '3';
UPDATE late SET a = 'worse' WHERE id = '5';
CALL rm_alter_types('late', '{"a": {"type": "int", "using": "a::int"}, "b": {"type": "int", "using": "b::int"}}', 'direct');
\echo SQLSTATE :SQLSTATE
DROP TABLE late;

-- identity columns become smaller, as by ALTER TABLE
CREATE TABLE small (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int GENERATED BY DEFAULT AS IDENTITY (INCREMENT -1));
CALL rm_alter_types('small', '{"id": "smallint", "n": "smallint"}', 'online_rewrite');
SELECT sequencename, data_type, min_value, max_value FROM pg_sequences WHERE schemaname = 'public' ORDER BY 1;
DROP TABLE small;

-- in the background
SELECT rm_start('item', '{"n": "bigint", "word": "varchar(40)"}', cut_over => 'manual', method => 'online_rewrite') > 0 AS started;
DO $$BEGIN
	FOR i IN 1 .. 10000 LOOP
		EXIT WHEN (SELECT next_call ~ 'cut_over' FROM rm_migrations ORDER BY id DESC LIMIT 1);
		PERFORM pg_sleep(0.01);
	END LOOP;
END$$;
CALL rm_cut_over();
SELECT column_name, state FROM rm_migrations ORDER BY id DESC LIMIT 1;

-- another collation, by each method, and the index that follows it
CREATE TABLE names (id int PRIMARY KEY, name varchar(20) NOT NULL);
INSERT INTO names VALUES (1, 'a'), (2, 'B'), (3, 'c');
CREATE INDEX names_name ON names (name);
CALL rm_alter_type('names', 'name', 'varchar(20) COLLATE "C"', method => 'online_rewrite');
\d names
SELECT string_agg(name, ' ' ORDER BY name) FROM names;
CALL rm_alter_type('names', 'name', 'text collate "POSIX"');
CALL rm_cleanup();
\d names
CALL rm_alter_type('names', 'name', 'text', method => 'direct');
\d names

-- refused, before anything is changed
CALL rm_alter_types(NULL, '{}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', NULL);
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', 'null');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '[]');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"n": 3}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"n": ["int"]}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"n": {"using": "n"}}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"n": {"type": "int", "use": "n"}}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"n": {"type": 4}}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"n": ""}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"nope": "int", "n": "int"}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"n": "int", "word": "nope"}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"n": "int", "word": {"type": "text", "using": "random()::text"}}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{"n": "int", "word": "text"}', 'three_step');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{}', 'three_step');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{}', 'direct');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{}', 'nope');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('item', '{}', batch => 0);
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('names', 'id', 'int COLLATE "C"');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('names', 'name', 'text COLLATE nope');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('names', 'name', 'text COLLATE "C" || 1');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('names', 'name', 'text COLLATE "C"; SELECT 1');
\echo SQLSTATE :SQLSTATE
-- a generated column
CREATE TABLE made (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id * 2) STORED);
CALL rm_alter_types('made', '{"g": "bigint"}');
\echo SQLSTATE :SQLSTATE
DROP TABLE made;
-- without a key: what to do instead
CREATE TABLE unkeyed (a int, b int);
CALL rm_alter_types('unkeyed', '{}');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_types('unkeyed', '{"a": "bigint", "b": "bigint"}', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
DROP TABLE unkeyed;
-- a key that the old one does not tell
CALL rm_alter_types('item', '{"id": {"type": "bigint", "using": "id + n"}, "word": "text"}', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
-- all that is in the way, of each column
CREATE MATERIALIZED VIEW m_n AS SELECT n FROM item;
CREATE MATERIALIZED VIEW m_both AS SELECT n, word FROM item;
CALL rm_alter_types('item', '{"n": "int", "word": "text"}', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
SELECT count(*) FROM rm_migrations WHERE state = 'open';

DROP SCHEMA twin CASCADE;
DROP TABLE item, names CASCADE;
DROP FUNCTION make, nothing CASCADE;
DROP EXTENSION risky_migrations;
