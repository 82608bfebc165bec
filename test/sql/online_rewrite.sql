-- The method online_rewrite: what it refuses, before anything is changed, and
-- the way of one migration from its first step to its end, with what it locks.
\set VERBOSITY default
\set SHOW_CONTEXT never
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS risky_migrations CASCADE;
CREATE EXTENSION risky_migrations;
CREATE SCHEMA rewriting;
SET search_path = rewriting, public;

-- ---------------------------------------------------------------------------
-- Tables and columns that it cannot change
-- ---------------------------------------------------------------------------

CREATE TABLE no_key (id int, v text);
CALL rm_alter_type('no_key', 'v', 'int', 'v::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
CREATE UNIQUE INDEX ON no_key (id);
-- unique, but what is NULL is not told apart
CALL rm_alter_type('no_key', 'v', 'int', 'v::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
-- an expression, and a part of the rows
ALTER TABLE no_key ALTER id SET NOT NULL;
DROP INDEX no_key_id_idx;
CREATE UNIQUE INDEX ON no_key (abs(id));
CREATE UNIQUE INDEX ON no_key (id) WHERE id > 0;
CALL rm_alter_type('no_key', 'v', 'int', 'v::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
DROP TABLE no_key;
CREATE TABLE whole (id int, v text) PARTITION BY RANGE (id);
CREATE TABLE part PARTITION OF whole DEFAULT;
CALL rm_alter_type('whole', 'v', 'int', 'v::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('part', 'v', 'int', 'v::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
CREATE TABLE parent (id int PRIMARY KEY, v text);
CREATE TABLE child () INHERITS (parent);
CALL rm_alter_type('parent', 'v', 'int', 'v::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
CREATE TEMP TABLE mine (id int PRIMARY KEY, v text);
CALL rm_alter_type('mine', 'v', 'int', 'v::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
CREATE TABLE made (id int PRIMARY KEY, v text, w text GENERATED ALWAYS AS (upper(v)) STORED);
CALL rm_alter_type('made', 'w', 'varchar(10)', NULL, 'online_rewrite');
\echo SQLSTATE :SQLSTATE
-- the key alone does not tell what the new key is
CREATE TABLE told (id int, salt int, PRIMARY KEY (id));
CALL rm_alter_type('told', 'id', 'bigint', 'id + salt', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
-- what ALTER TABLE would refuse
CREATE TABLE defaulted (id int PRIMARY KEY, v text DEFAULT 'none');
CALL rm_alter_type('defaulted', 'v', 'int', 'v::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('defaulted', 'v', 'int', 'v::int + random()::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
SELECT count(*) FROM rm_migrations WHERE state = 'open';
SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d';

-- ---------------------------------------------------------------------------
-- One migration
-- ---------------------------------------------------------------------------

CREATE TABLE orders (id int PRIMARY KEY, amount varchar(20) NOT NULL, note text);
INSERT INTO orders SELECT g, g * 10, 'note ' || g FROM generate_series(1, 3000) g;
CREATE INDEX orders_amount ON orders (amount);
CALL rm_alter_type('orders', 'amount', 'numeric(12,2)', 'amount::numeric', 'online_rewrite', cut_over => 'manual');
SELECT id, method, state, next_call = format('CALL rm_cut_over(%s)', id) AS cut_over_is_next
FROM rm_migrations WHERE state = 'open' \gset
SELECT :'method' AS method, :'state' AS state, :'cut_over_is_next' AS cut_over_is_next;

-- the table is as it was, and has the whole table for itself
\d orders
CALL rm_alter_type('orders', 'note', 'varchar(100)', NULL, 'three_step');
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('orders', 'note', 'varchar(100)', NULL, 'online_rewrite');
\echo SQLSTATE :SQLSTATE
UPDATE orders SET amount = '7' WHERE id <= 10;
DELETE FROM orders WHERE id > 2990;
SELECT log::regclass AS log FROM risky_migrations.rewrite WHERE migration_id = :id \gset
SELECT count(*) AS log_rows FROM :log \gset
SELECT :log_rows AS log_rows;

CALL rm_cut_over();
SELECT state FROM rm_migrations WHERE id = :id;
\d orders
SELECT count(*), sum(amount), count(*) FILTER (WHERE amount = 7) FROM orders;
SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d';
-- what was locked: ACCESS EXCLUSIVE in the cut-over only
SELECT step, relation, role, lock_mode, blocks_reads, blocks_writes, hold_is_exact, rewritten
FROM rm_lock_report() WHERE approach = 'online_rewrite' AND relation = 'rewriting.orders' AND (blocks_writes OR step <> 'cut_over')
	AND started_at >= (SELECT started_at FROM rm_migrations WHERE id = :id)
ORDER BY started_at, relation, lock_mode;

-- no way back
CALL rm_rollback(:id);
\echo SQLSTATE :SQLSTATE
CALL rm_alter_type('orders', 'amount', 'varchar(20)', 'amount::int::text', 'online_rewrite');
SELECT pg_typeof(amount), count(*), sum(amount::int) FROM orders GROUP BY 1;

-- given up: nothing is left, nothing was changed
CALL rm_alter_type('orders', 'amount', 'bigint', 'amount::bigint', 'online_rewrite', cut_over => 'manual');
CALL rm_rollback();
SELECT pg_typeof(amount), count(*), sum(amount::int) FROM orders GROUP BY 1;
SELECT tgname FROM pg_trigger WHERE tgrelid = 'orders'::regclass;
SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d';
SELECT count(*) FROM risky_migrations.rewrite;

-- ---------------------------------------------------------------------------
-- Values that do not convert, or that the changed table would refuse
-- ---------------------------------------------------------------------------

CREATE TABLE odd (id int PRIMARY KEY, v text, w text CHECK (w <> 'never'));
INSERT INTO odd VALUES (1, '1', '1'), (2, 'two', '2'), (3, NULL, '3'), (4, '400', '4');
CREATE DOMAIN below_100 AS int CHECK (value < 100);
CALL rm_alter_type('odd', 'v', 'below_100', 'v::int', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
SELECT row_key, value, sqlstate, message FROM rm_conversion_errors ORDER BY row_key, message;
SELECT next_call = format('SELECT rm_resume(%s)', id) AS resume_is_next FROM rm_migrations WHERE state = 'open';
UPDATE odd SET v = 5 WHERE id IN (2, 4);
CALL rm_cut_over();
SELECT id, v, pg_typeof(v) FROM odd ORDER BY id;

CREATE TABLE odd2 (id int PRIMARY KEY, v text);
INSERT INTO odd2 VALUES (1, '1'), (2, 'two');
CALL rm_alter_type('odd2', 'v', 'int', 'v::int', 'online_rewrite', on_error => 'null');
SELECT id, v FROM odd2 ORDER BY id;
SELECT row_key, value, sqlstate FROM rm_conversion_errors WHERE relation = 'rewriting.odd2';

-- what is recorded of rows goes with a table that is dropped
CREATE TABLE dropped (id int PRIMARY KEY, v text);
INSERT INTO dropped VALUES (1, 'one');
CALL rm_alter_type('dropped', 'v', 'int', 'v::int', 'online_rewrite');
SELECT id AS dropped FROM rm_migrations WHERE state = 'open' \gset
SELECT count(*) FROM rm_conversion_errors WHERE migration = :dropped;
DROP TABLE dropped;
CALL rm_rollback();
SELECT count(*) FROM risky_migrations.conversion_error WHERE migration_id = :dropped;
CREATE TABLE dropped (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO dropped VALUES (1, 'one');
CALL rm_alter_type('dropped', 'v', 'int', 'v::int', 'three_step');
SELECT id AS dropped FROM rm_migrations WHERE state = 'open' \gset
SELECT count(*) FROM rm_conversion_errors WHERE migration = :dropped;
DROP TABLE dropped;
CALL rm_rollback();
SELECT count(*) FROM risky_migrations.conversion_error WHERE migration_id = :dropped;

-- what was unique is not any more
CREATE TABLE twice (id int PRIMARY KEY, v text UNIQUE);
INSERT INTO twice VALUES (1, '1'), (2, '1.0');
CALL rm_alter_type('twice', 'v', 'numeric', 'v::numeric', 'online_rewrite');
\echo SQLSTATE :SQLSTATE
DELETE FROM twice WHERE id = 2;
SELECT id AS twice FROM rm_migrations WHERE state = 'open' \gset
CALL rm_rollback(:twice);
SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d';

-- ---------------------------------------------------------------------------
-- A child that has come meanwhile: ALTER TABLE goes down to it
-- ---------------------------------------------------------------------------

CREATE TABLE ancestor (id int PRIMARY KEY, v text);
INSERT INTO ancestor SELECT g, g FROM generate_series(1, 10) g;
CALL rm_alter_type('ancestor', 'v', 'int', 'v::int', 'online_rewrite', cut_over => 'manual');
CREATE TABLE heir () INHERITS (ancestor);
INSERT INTO heir VALUES (11, '11');
CALL rm_cut_over();
\echo SQLSTATE :SQLSTATE
SELECT v, pg_typeof(v) FROM heir;
ALTER TABLE heir ADD PRIMARY KEY (id);
CALL rm_cut_over();
SELECT tableoid::regclass, pg_typeof(v), sum(v) FROM ancestor GROUP BY 1, 2 ORDER BY 1;
DROP TABLE heir;
-- none is left, though pg_class says so
CALL rm_alter_type('ancestor', 'v', 'bigint', method => 'online_rewrite');
SELECT pg_typeof(v), sum(v) FROM ancestor GROUP BY 1;

-- ---------------------------------------------------------------------------
-- Its trigger function is for its triggers
-- ---------------------------------------------------------------------------

CREATE TRIGGER wrong BEFORE UPDATE ON twice FOR EACH ROW EXECUTE FUNCTION risky_migrations.log_change(1);
UPDATE twice SET v = '2';
\echo SQLSTATE :SQLSTATE
DROP TRIGGER wrong ON twice;
CREATE TRIGGER wrong AFTER UPDATE ON twice FOR EACH ROW EXECUTE FUNCTION risky_migrations.log_change();
UPDATE twice SET v = '2';
\echo SQLSTATE :SQLSTATE
DROP TRIGGER wrong ON twice;
-- one without a log does nothing
CREATE TRIGGER wrong AFTER UPDATE ON twice FOR EACH ROW EXECUTE FUNCTION risky_migrations.log_change(4711);
UPDATE twice SET v = '2';

SET search_path = public;
DROP SCHEMA rewriting CASCADE;
DROP EXTENSION risky_migrations CASCADE;
