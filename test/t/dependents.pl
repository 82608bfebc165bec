# What hangs on a column comes along: indexes, constraints, default, identity,
# sequence, statistics, comments, grants, views, rules, policies, triggers.
#
# Each scenario is a few tables in a schema.  Databases of their own hold them:
# in one the column is changed by ALTER TABLE itself, in one by the three steps, swap
# and cleanup, in one by the three steps and swap and then taken back.  What
# pg_dump -s says of the second must be what it says of the first, but for the
# column's place in the table (and what ALTER TABLE itself forgets, "lost" here);
# of the third, what it said before, to the letter.

use strict;
use warnings;

use IPC::Run;
use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = LabNode->new('dependents');
$node->init;
$node->append_conf(
	'postgresql.conf', q{
client_min_messages = warning
fsync = off
max_worker_processes = 20
allow_in_place_tablespaces = on
});
$node->start;

my @scenarios = (
	{
		name => 'int to bigint: identity, primary key, foreign keys both ways',
		table => 'orders', column => 'id', type => 'bigint', rows => 500,
		# ALTER TABLE makes indexes again where they were
		settings => 'SET default_tablespace = elsewhere',
		setup => q{
CREATE TABLE customer (id int PRIMARY KEY);
INSERT INTO customer SELECT generate_series(1, 10);
CREATE TABLE orders (id int GENERATED ALWAYS AS IDENTITY (START 7 INCREMENT 3) CONSTRAINT "Orders PK" PRIMARY KEY,
	x text, customer int REFERENCES customer, note text DEFAULT 'none' CHECK (note <> ''));
INSERT INTO orders (x, customer) SELECT 'x' || g, 1 + g % 10 FROM generate_series(1, 500) g;
CREATE TABLE line (order_id int, n int, PRIMARY KEY (order_id, n),
	CONSTRAINT "line's order" FOREIGN KEY (order_id) REFERENCES orders ON UPDATE CASCADE ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED);
INSERT INTO line SELECT id, 1 FROM orders;
CREATE TABLE late (order_id int);
ALTER TABLE late ADD CONSTRAINT unproven FOREIGN KEY (order_id) REFERENCES orders NOT VALID;
COMMENT ON CONSTRAINT "line's order" ON line IS 'whose line it is';
COMMENT ON CONSTRAINT "Orders PK" ON orders IS 'the key';
COMMENT ON COLUMN orders.id IS 'counts';
GRANT SELECT (id), UPDATE (id, x) ON orders TO reader;
GRANT SELECT (id) ON orders TO PUBLIC;
},
	},
	{
		name => 'the referring column of a foreign key, with ON DELETE SET NULL',
		table => 'line', column => 'order_id', type => 'bigint', rows => 100,
		setup => q{
CREATE TABLE orders (id int PRIMARY KEY);
INSERT INTO orders SELECT generate_series(1, 100);
CREATE TABLE line (id bigserial PRIMARY KEY, order_id int, n int, FOREIGN KEY (order_id) REFERENCES orders ON DELETE SET NULL,
	CONSTRAINT positive CHECK (order_id > 0) NO INHERIT, UNIQUE (order_id, n));
INSERT INTO line (order_id, n) SELECT g, g FROM generate_series(1, 100) g;
},
	},
	{
		name => 'serial', table => 'counted', column => 'id', type => 'bigint', rows => 10, lost => ['ALTER SEQUENCE counted_id_seq AS bigint'],
		setup => q{
CREATE TABLE counted (id serial PRIMARY KEY, v int);
INSERT INTO counted (v) SELECT generate_series(1, 10);
GRANT USAGE ON SEQUENCE counted_id_seq TO reader;
COMMENT ON SEQUENCE counted_id_seq IS 'mine';
},
	},
	{
		name => 'varchar to timestamp: indexes of every kind, statistics',
		lost => [ 'ALTER INDEX coalesced ALTER COLUMN 1 SET STATISTICS 77', 'ALTER STATISTICS stats SET STATISTICS 50' ],
		table => '"Mixed Case"', column => 'Created At', type => 'timestamp', using => '"Created At"::timestamp', rows => 300,
		setup => q{
CREATE TABLE "Mixed Case" (id int PRIMARY KEY, gone int, "Created At" varchar(50) NOT NULL, "o'ther" text, n int);
ALTER TABLE "Mixed Case" DROP COLUMN gone;
INSERT INTO "Mixed Case" SELECT g, '2024-01-01 10:00:00'::timestamp + g * interval '1 s', 'o' || g, g % 7 FROM generate_series(1, 300) g;
CREATE INDEX plain ON "Mixed Case" ("Created At");
CREATE INDEX "Desc ix" ON "Mixed Case" ("Created At" DESC NULLS LAST, n) INCLUDE ("o'ther") WITH (fillfactor = 55);
CREATE UNIQUE INDEX nulls ON "Mixed Case" ("Created At", id) NULLS NOT DISTINCT;
CREATE INDEX partial ON "Mixed Case" (n) WHERE "Created At" IS NOT NULL;
CREATE INDEX hashed ON "Mixed Case" USING hash ("Created At");
CREATE INDEX brinned ON "Mixed Case" USING brin ("Created At") WITH (pages_per_range = 16);
CREATE INDEX coalesced ON "Mixed Case" ((coalesce(n, 0)), "Created At" ASC);
CREATE INDEX untouched ON "Mixed Case" (n);
ALTER INDEX coalesced ALTER COLUMN 1 SET STATISTICS 77;
COMMENT ON INDEX partial IS 'only some';
ALTER TABLE "Mixed Case" CLUSTER ON "Desc ix";
ALTER TABLE "Mixed Case" REPLICA IDENTITY USING INDEX "nulls";
CREATE STATISTICS stats (dependencies, ndistinct) ON "Created At", n FROM "Mixed Case";
CREATE STATISTICS "Expr Stats" ON "Created At", (n + 1) FROM "Mixed Case";
COMMENT ON STATISTICS stats IS 'both';
ALTER STATISTICS stats SET STATISTICS 50;
ALTER TABLE "Mixed Case" ALTER "Created At" SET STATISTICS 321, ALTER "Created At" SET (n_distinct = -0.5);
COMMENT ON COLUMN "Mixed Case"."Created At" IS $$it's when$$;
},
	},
	{
		name => 'int to bigint: expressions, unique, CHECK of several columns, a self reference, names of 63 bytes',
		table => 'tree', column => 'c' x 63, type => 'bigint', rows => 50,
		setup => q{
CREATE TABLE tree (id int PRIMARY KEY, THE_COLUMN int UNIQUE, parent int, lo int, hi int DEFAULT 100000,
	CONSTRAINT "ordered rows" CHECK (lo < THE_COLUMN AND THE_COLUMN < hi),
	FOREIGN KEY (parent) REFERENCES tree (THE_COLUMN));
INSERT INTO tree SELECT g, g, nullif(g / 2, 0), -1 FROM generate_series(1, 50) g;
ALTER TABLE tree ADD CONSTRAINT fresh CHECK (THE_COLUMN > 0) NOT VALID;
CREATE INDEX expr ON tree (abs(THE_COLUMN), (THE_COLUMN * 2) DESC) WHERE THE_COLUMN % 2 = 0;
ALTER TABLE tree ALTER COLUMN THE_COLUMN SET DEFAULT 17;
},
	},
	{
		name => 'storage, compression, collation, an unlogged table, a default that is cast',
		table => 'texts', column => 'v', type => 'varchar(200)', rows => 20, lossy => 1,
		setup => q{
CREATE UNLOGGED TABLE texts (v text DEFAULT 'a' || 'b', id int);
INSERT INTO texts SELECT repeat('x', g), g FROM generate_series(1, 20) g;
CREATE INDEX texts_v ON texts (v text_pattern_ops, id);
CREATE INDEX texts_c ON texts (v COLLATE "C");
CREATE INDEX texts_l ON texts (lower(v) varchar_pattern_ops);
},
	},	{
		name => 'what ALTER TABLE refuses to change: views on views, rules, policies, triggers',
		table => 'fact', column => 'at', type => 'timestamp', using => 'at::timestamp', rows => 60,
		setup => q{
CREATE TABLE fact (id int PRIMARY KEY, at text NOT NULL, n int DEFAULT 3, CONSTRAINT "at and id" UNIQUE (at, id));
INSERT INTO fact SELECT g, timestamp '2024-02-28' + g * interval '1 day', g FROM generate_series(1, 60) g;
CREATE TABLE seen (id int, at text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
ALTER TABLE fact ENABLE ROW LEVEL SECURITY;
},
		# the same in all databases, but made after the ALTER TABLE in the first
		around => q{
CREATE VIEW by_day WITH (security_barrier) AS SELECT at, count(*) AS n FROM fact GROUP BY at;
CREATE VIEW "Latest" AS SELECT max(at) AS "When" FROM by_day;
CREATE VIEW whole AS SELECT f.id, f.at AS moment FROM fact f WHERE f.n > 0 WITH LOCAL CHECK OPTION;
ALTER VIEW whole ALTER COLUMN id SET DEFAULT 17;
CREATE VIEW grouped AS SELECT id, at FROM fact GROUP BY id;
COMMENT ON VIEW whole IS 'all of them';
COMMENT ON COLUMN whole.moment IS 'when';
GRANT SELECT ON by_day TO reader WITH GRANT OPTION;
GRANT UPDATE (moment) ON whole TO PUBLIC;
CREATE RULE on_insert AS ON INSERT TO seen WHERE EXISTS (SELECT FROM fact WHERE fact.id = NEW.id AND fact.at IS NOT NULL) DO ALSO DELETE FROM seen WHERE seen.id < 0;
CREATE TRIGGER noted BEFORE UPDATE OF at ON fact FOR EACH ROW WHEN (OLD.at IS DISTINCT FROM NEW.at) EXECUTE FUNCTION note();
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON fact DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.at IS NOT NULL) EXECUTE FUNCTION note();
CREATE TRIGGER instead INSTEAD OF INSERT ON whole FOR EACH ROW EXECUTE FUNCTION note();
ALTER TABLE fact DISABLE TRIGGER noted;
COMMENT ON TRIGGER late ON fact IS 'at the end';
CREATE POLICY recent ON fact FOR SELECT TO reader USING (at IS NOT NULL);
CREATE POLICY elsewhere ON seen USING (id IN (SELECT fact.id FROM fact WHERE fact.at IS NOT NULL));
},
	},
	{
		name => 'publications: lists of columns, conditions, both',
		table => 'told', column => 'v', type => 'bigint', rows => 50,
		setup => q{
CREATE TABLE told (id int, v int NOT NULL, n int, PRIMARY KEY (id, v));
INSERT INTO told SELECT g, g, g FROM generate_series(1, 50) g;
CREATE TABLE beside (id int PRIMARY KEY, v int);
},
		around => q{
CREATE PUBLICATION "Listed" FOR TABLE told (id, v), beside WITH (publish = 'insert, update');
CREATE PUBLICATION filtered FOR TABLE told (id, v, n) WHERE (v > 7 AND id > 0);
CREATE PUBLICATION inserts FOR TABLE told (id, n) WHERE (v <> 3) WITH (publish = 'insert');
CREATE PUBLICATION untouched FOR TABLE told (id, n) WHERE (n > 3) WITH (publish = 'insert');
COMMENT ON PUBLICATION filtered IS 'some';
},
		same => q{
SELECT string_agg(format('%s %s %s %s', pubname, tablename, (SELECT array_agg(a ORDER BY a) FROM unnest(attnames) a), rowfilter), ', '
	ORDER BY pubname, tablename) FROM pg_publication_tables},
	},
	{
		name => 'materialized views: chains, views between and on them, not populated, all that they have',
		table => 'sale', column => 'id', type => 'bigint', rows => 200,
		settings => 'SET risky_migrations.recreate_matviews = on',
		setup => q{
CREATE TABLE sale (id int PRIMARY KEY, day date, n int);
INSERT INTO sale SELECT g, date '2024-01-01' + g / 10, g % 7 FROM generate_series(1, 200) g;
CREATE TABLE place (id int, name text);
INSERT INTO place SELECT g, 'p' || g FROM generate_series(1, 9) g;
GRANT SELECT ON sale, place TO hoarder;
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
},
		around => q{
CREATE VIEW below WITH (security_barrier) AS SELECT id, day, n FROM sale WHERE n > 0;
CREATE VIEW "Below that" (number, word) AS SELECT b.id, b::text FROM below b;
CREATE MATERIALIZED VIEW "By Day" (day, ids, top, label) WITH (fillfactor = 71, autovacuum_enabled = off, toast.autovacuum_enabled = off) TABLESPACE elsewhere AS
	SELECT day, count(id), max(id), 'day ' || day::text FROM below GROUP BY day;
CREATE MATERIALIZED VIEW on_both AS SELECT d.day, d.top, b.number, b.word FROM "By Day" d JOIN "Below that" b ON b.number = d.top;
CREATE MATERIALIZED VIEW empty AS SELECT o.top FROM on_both o WITH NO DATA;
CREATE MATERIALIZED VIEW joined AS SELECT id, p.name, s.n FROM sale s JOIN place p USING (id);
CREATE MATERIALIZED VIEW "no column" AS SELECT count(*) AS n FROM sale WHERE id > 2;
CREATE VIEW on_stored AS SELECT max(top) AS top FROM on_both;
CREATE VIEW on_all AS SELECT o.top, j.name FROM on_stored o, joined j, below b WHERE b.id = o.top;
CREATE MATERIALIZED VIEW summit AS SELECT top, name FROM on_all;
CREATE UNIQUE INDEX by_day_key ON "By Day" (day) TABLESPACE elsewhere;
CREATE INDEX "By Top" ON "By Day" (top DESC NULLS LAST) INCLUDE (label) WITH (fillfactor = 55) WHERE top > 3;
CREATE INDEX expr ON "By Day" (lower(label) text_pattern_ops, (top + 1));
CREATE INDEX gone ON "By Day" USING brin (ids);
CREATE INDEX joined_id ON joined (id);
ALTER INDEX expr ALTER COLUMN 2 SET STATISTICS 77;
ALTER MATERIALIZED VIEW "By Day" CLUSTER ON by_day_key;
ALTER MATERIALIZED VIEW "By Day" ALTER top SET STATISTICS 200, ALTER ids SET (n_distinct = -0.5);
ALTER MATERIALIZED VIEW "By Day" ALTER label SET STORAGE EXTERNAL, ALTER label SET COMPRESSION pglz;
CREATE STATISTICS pair (ndistinct, mcv) ON day, top FROM "By Day";
CREATE STATISTICS by_expr ON (top + 1) FROM "By Day";
ALTER STATISTICS pair SET STATISTICS 40;
COMMENT ON STATISTICS pair IS 'both';
COMMENT ON MATERIALIZED VIEW "By Day" IS 'each day''s';
COMMENT ON COLUMN "By Day".top IS 'the last one';
COMMENT ON INDEX expr IS 'odd';
GRANT SELECT ON "By Day" TO reader WITH GRANT OPTION;
GRANT SELECT (name) ON joined TO PUBLIC;
GRANT SELECT ON below TO reader, hoarder;
REVOKE ALL ON empty FROM keeper;
CREATE TRIGGER instead INSTEAD OF INSERT ON below FOR EACH ROW EXECUTE FUNCTION note();
CREATE RULE late AS ON DELETE TO "Below that" DO INSTEAD NOTHING;
ALTER VIEW below ALTER n SET DEFAULT 4;
COMMENT ON VIEW below IS 'read by what is stored';
ALTER MATERIALIZED VIEW joined OWNER TO hoarder;
ALTER VIEW "Below that" OWNER TO hoarder;
},
		# what readers find, and what is not populated
		same => q{
SELECT string_agg(t, ' ' ORDER BY t) FROM (
	SELECT relname || relispopulated FROM pg_class WHERE relkind = 'm'
	UNION ALL SELECT d::text FROM it."By Day" d
	UNION ALL SELECT o::text FROM it.on_both o
	UNION ALL SELECT s::text FROM it.summit s
	UNION ALL SELECT j::text FROM it.joined j
	UNION ALL SELECT starelid::regclass::text || staattnum FROM pg_statistic s JOIN pg_class c ON c.oid = starelid WHERE c.relkind = 'm'
	UNION ALL SELECT n::text FROM it."no column" n) x (t)},
	},
	{
		not_null => { 'CONSTRAINT event_at_not_null NOT NULL' => 'NOT NULL' },
		name => 'partitioned: two levels, a default partition, other columns, indexes and constraints of their own',
		table => 'event', column => 'at', type => 'timestamp', using => 'at::timestamp', rows => 300,
		# it names the indexes of partitions anew, gives them the parent's comments, and forgets what is marked
		lost => [ 'ALTER INDEX event_2_at_n_idx RENAME TO attached', 'ALTER TABLE event_2 RENAME CONSTRAINT event_2_pkey TO "E2 key"',
			'ALTER TABLE event_1 REPLICA IDENTITY USING INDEX event_1_pkey', 'ALTER TABLE event_1 CLUSTER ON event_1_at_n_idx',
			q{COMMENT ON INDEX event_1_at_n_idx IS 'of one'}, 'COMMENT ON INDEX "Event 3 low_at_idx" IS NULL',
			'COMMENT ON INDEX event_3_high_at_idx IS NULL' ],
		setup => q{
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TABLE event (id int, kind int NOT NULL, at varchar(40) NOT NULL, n int DEFAULT 5,
	CONSTRAINT "Event PK" PRIMARY KEY (kind, at, id), CONSTRAINT fine CHECK (at <> '' AND n > 0)) PARTITION BY LIST (kind);
CREATE TABLE event_1 PARTITION OF event FOR VALUES IN (1);
CREATE TABLE event_2 (gone text, n int DEFAULT 7, at varchar(40) NOT NULL, kind int NOT NULL, id int NOT NULL,
	CONSTRAINT fine CHECK (at <> '' AND n > 0), CONSTRAINT "own check" CHECK (at <> 'x') NOT VALID,
	CONSTRAINT "E2 key" PRIMARY KEY (kind, at, id), UNIQUE (at, n, id));
ALTER TABLE event_2 DROP COLUMN gone;
CREATE INDEX "own index" ON event_2 (at DESC) WHERE n > 2;
CREATE INDEX attached ON event_2 (at, n);
ALTER TABLE event ATTACH PARTITION event_2 FOR VALUES IN (2);
CREATE TABLE event_3 PARTITION OF event FOR VALUES IN (3, 4) PARTITION BY RANGE (id);
CREATE TABLE "Event 3 low" PARTITION OF event_3 FOR VALUES FROM (0) TO (100);
CREATE TABLE event_3_high PARTITION OF event_3 FOR VALUES FROM (100) TO (1000);
ALTER TABLE event_3 ADD CONSTRAINT third CHECK (at IS DISTINCT FROM 'y');
CREATE TABLE event_rest PARTITION OF event DEFAULT;
INSERT INTO event SELECT g, g % 6, '2024-01-01 10:00:00'::timestamp + g * interval '1 s', 1 + g FROM generate_series(1, 300) g;
CREATE INDEX event_at_n ON event (at, n);
CREATE INDEX expr ON event (n, coalesce(at, at)) WITH (fillfactor = 77);
CREATE INDEX at_three ON event_3 USING brin (at);
CREATE UNIQUE INDEX unique_ones ON event (kind, n, at, id) INCLUDE (id);
CREATE INDEX untouched ON event (n);
ALTER TABLE event REPLICA IDENTITY USING INDEX "Event PK";
ALTER TABLE event_1 REPLICA IDENTITY USING INDEX event_1_pkey;
ALTER TABLE event_1 CLUSTER ON event_1_at_n_idx;
CREATE STATISTICS pair ON at, n FROM event;
CREATE STATISTICS one_only (ndistinct) ON kind, at FROM event_2;
ALTER TABLE event ALTER at SET STATISTICS 200;
ALTER TABLE event_1 ALTER at SET STATISTICS 300;
COMMENT ON COLUMN event.at IS 'when';
COMMENT ON COLUMN event_2.at IS 'when, too';
COMMENT ON INDEX at_three IS 'of three';
COMMENT ON INDEX event_1_at_n_idx IS 'of one';
COMMENT ON CONSTRAINT fine ON event IS 'root';
COMMENT ON CONSTRAINT fine ON event_1 IS 'leaf';
COMMENT ON CONSTRAINT "Event PK" ON event IS 'the key';
GRANT SELECT (at) ON event TO reader;
GRANT UPDATE (at) ON event_3_high TO PUBLIC;
},
		around => q{
CREATE VIEW whole AS SELECT at, count(*) AS n FROM event GROUP BY at;
CREATE VIEW of_one AS SELECT at FROM event_2 WHERE at IS NOT NULL;
CREATE TRIGGER noted AFTER UPDATE OF at ON event FOR EACH ROW WHEN (OLD.at IS NOT NULL) EXECUTE FUNCTION note();
ALTER TABLE event_2 DISABLE TRIGGER noted;
CREATE TRIGGER off BEFORE INSERT ON event FOR EACH ROW WHEN (NEW.at IS NOT NULL) EXECUTE FUNCTION note();
ALTER TABLE event DISABLE TRIGGER off;
ALTER TABLE ONLY event_1 ENABLE ALWAYS TRIGGER off;
COMMENT ON TRIGGER off ON event_1 IS 'is not';
CREATE TRIGGER own BEFORE UPDATE ON event_1 FOR EACH ROW WHEN (NEW.at IS NOT NULL) EXECUTE FUNCTION note();
CREATE POLICY recent ON event USING (at IS NOT NULL);
CREATE POLICY leaf ON event_1 TO reader USING (at IS NOT NULL);
CREATE RULE leaf_rule AS ON INSERT TO event_2 WHERE NEW.at IS NULL DO INSTEAD NOTHING;
},
	},
	{
		not_null => { 'CONSTRAINT line_order_id_not_null NOT NULL' => 'NOT NULL' },
		name => 'partitioned: int to bigint, foreign keys, identity, serial',
		table => 'line', column => 'order_id', type => 'bigint', rows => 200,
		setup => q{
CREATE TABLE orders (id int PRIMARY KEY);
INSERT INTO orders SELECT generate_series(1, 200);
CREATE TABLE far (id int PRIMARY KEY) PARTITION BY HASH (id);
CREATE TABLE far_0 PARTITION OF far FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE far_1 PARTITION OF far FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO far SELECT generate_series(1, 200);
CREATE TABLE line (day int, order_id int GENERATED BY DEFAULT AS IDENTITY, n int) PARTITION BY RANGE (day);
CREATE TABLE line_a (n int, order_id int NOT NULL CONSTRAINT "own fk" REFERENCES orders ON DELETE CASCADE, day int,
	CONSTRAINT "attached fk" FOREIGN KEY (order_id) REFERENCES far ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED);
ALTER TABLE line ATTACH PARTITION line_a FOR VALUES FROM (0) TO (10);
CREATE TABLE line_b PARTITION OF line FOR VALUES FROM (10) TO (100) PARTITION BY LIST (n);
CREATE TABLE line_b_0 PARTITION OF line_b FOR VALUES IN (0);
CREATE TABLE line_b_rest PARTITION OF line_b DEFAULT;
INSERT INTO line SELECT g % 20, g, g % 3 FROM generate_series(1, 200) g;
ALTER TABLE line ADD CONSTRAINT "to far" FOREIGN KEY (order_id) REFERENCES far ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE line_b ADD CONSTRAINT middle FOREIGN KEY (order_id) REFERENCES orders ON DELETE SET NULL;
ALTER TABLE line ADD UNIQUE (day, n, order_id);
ALTER TABLE line_b_0 ADD UNIQUE (order_id);
CREATE TABLE ref (order_id int REFERENCES line_b_0 (order_id));
COMMENT ON CONSTRAINT "to far" ON line IS 'far';
},
	},
	{
		not_null => { 'CONSTRAINT orders_id_not_null NOT NULL' => 'CONSTRAINT "own name" NOT NULL' },
		name => 'partitioned: int to bigint with foreign keys that refer to it',
		table => 'orders', column => 'id', type => 'bigint', rows => 200,
		setup => q{
CREATE TABLE orders (day int, id int, PRIMARY KEY (day, id)) PARTITION BY RANGE (day);
CREATE TABLE orders_a (id int CONSTRAINT "own name" NOT NULL UNIQUE DEFAULT 7, day int NOT NULL);
ALTER TABLE orders ATTACH PARTITION orders_a FOR VALUES FROM (0) TO (10);
CREATE TABLE orders_b PARTITION OF orders FOR VALUES FROM (10) TO (100) PARTITION BY LIST (day);
CREATE TABLE orders_b_rest PARTITION OF orders_b DEFAULT;
INSERT INTO orders SELECT g % 20, g FROM generate_series(1, 200) g;
CREATE TABLE line (day int, order_id int, n int, CONSTRAINT "line's order" FOREIGN KEY (day, order_id) REFERENCES orders
	ON UPDATE CASCADE ON DELETE SET NULL (order_id) DEFERRABLE);
INSERT INTO line SELECT day, id FROM orders;
INSERT INTO line VALUES (NULL, 77777);
CREATE TABLE late (day int, order_id int);
ALTER TABLE late ADD CONSTRAINT unproven FOREIGN KEY (order_id, day) REFERENCES orders (id, day) MATCH FULL NOT VALID;
CREATE TABLE of_one (order_id int REFERENCES orders_a (id));
COMMENT ON CONSTRAINT "line's order" ON line IS 'whose line it is';
},
	},
	{
		name => 'inherited: three levels, merged columns and constraints, another parent, other columns, indexes of their own',
		table => 'event', column => 'at', type => 'timestamp', using => 'at::timestamp', rows => 300,
		setup => q{
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TABLE thing (label text);
CREATE TABLE event (id int, at varchar(40) NOT NULL, n int DEFAULT 5, CONSTRAINT "Event PK" PRIMARY KEY (id),
	CONSTRAINT fine CHECK (at <> '' AND n > 0), CONSTRAINT late CHECK (at <> 'z') NOT VALID,
	CONSTRAINT here CHECK (at <> 'here') NO INHERIT) INHERITS (thing);
CREATE TABLE event_1 (CONSTRAINT "One key" UNIQUE (at, id)) INHERITS (event);
CREATE TABLE other (tag text);
CREATE TABLE event_2 (gone text, n int DEFAULT 7, at varchar(40) CONSTRAINT event_at_not_null NOT NULL, CONSTRAINT fine CHECK (at <> '' AND n > 0),
	extra text, CONSTRAINT "own check" CHECK (at <> extra), UNIQUE (at, n, extra)) INHERITS (other, event);
ALTER TABLE event_2 DROP COLUMN gone;
CREATE TABLE "Event 3" (k serial, CONSTRAINT third CHECK (at IS DISTINCT FROM 'y')) INHERITS (event_1);
-- by another name ALTER TABLE would refuse it, from 18 on
CREATE TABLE event_4 (at varchar(40) CONSTRAINT event_at_not_null NOT NULL DEFAULT timestamp '2020-01-01', id int NOT NULL, n int, label text,
	CONSTRAINT fine CHECK (at <> '' AND n > 0), CONSTRAINT third CHECK (at IS DISTINCT FROM 'y'),
	CONSTRAINT late CHECK (at <> 'z'));
CREATE INDEX "own index" ON event_4 (at DESC) WHERE n > 2;
ALTER TABLE event_4 INHERIT event;
CREATE INDEX ON event (at, n);
CREATE INDEX expr ON event_1 (n, coalesce(at, at)) WITH (fillfactor = 77);
CREATE INDEX ON "Event 3" USING brin (at);
INSERT INTO event (id, at, n) SELECT g, '2024-01-01 10:00:00'::timestamp + g * interval '1 s', 1 + g FROM generate_series(1, 60) g;
INSERT INTO event_1 (id, at, n) SELECT g, '2024-01-02 10:00:00'::timestamp + g * interval '1 s', 1 + g FROM generate_series(1, 60) g;
INSERT INTO event_2 (id, at, n) SELECT g, '2024-01-03 10:00:00'::timestamp + g * interval '1 s', 1 + g FROM generate_series(1, 60) g;
INSERT INTO "Event 3" (id, at, n) SELECT g, '2024-01-04 10:00:00'::timestamp + g * interval '1 s', 1 + g FROM generate_series(1, 60) g;
INSERT INTO event_4 (id, at, n) SELECT g, '2024-01-05 10:00:00'::timestamp + g * interval '1 s', 1 + g FROM generate_series(1, 60) g;
ALTER TABLE event_1 REPLICA IDENTITY USING INDEX "One key";
ALTER TABLE event_1 CLUSTER ON "One key";
CREATE STATISTICS pair ON at, n FROM event;
CREATE STATISTICS one_only (ndistinct) ON at, extra FROM event_2;
ALTER TABLE ONLY event ALTER at SET STATISTICS 200;
ALTER TABLE ONLY event_1 ALTER at SET STATISTICS 300;
ALTER TABLE ONLY "Event 3" ALTER at SET DEFAULT timestamp '2021-01-01';
COMMENT ON COLUMN event.at IS 'when';
COMMENT ON COLUMN event_2.at IS 'when, too';
COMMENT ON CONSTRAINT fine ON event IS 'root';
COMMENT ON CONSTRAINT fine ON event_1 IS 'child';
COMMENT ON CONSTRAINT fine ON event_4 IS 'child with its own';
COMMENT ON CONSTRAINT third ON event_4 IS 'of the fourth';
COMMENT ON INDEX "own index" IS 'of the fourth';
GRANT SELECT (at) ON event TO reader;
GRANT UPDATE (at) ON "Event 3" TO PUBLIC;
},
		lost => [ q{COMMENT ON CONSTRAINT fine ON event_1 IS 'child'} ],
		around => q{
CREATE VIEW whole AS SELECT at, count(*) AS n FROM event GROUP BY at;
CREATE VIEW rows AS SELECT e FROM event e;
CREATE VIEW here_only AS SELECT at FROM ONLY event;
CREATE VIEW of_one AS SELECT at FROM "Event 3" WHERE at IS NOT NULL;
CREATE TRIGGER noted AFTER UPDATE OF at ON event FOR EACH ROW WHEN (OLD.at IS NOT NULL) EXECUTE FUNCTION note();
CREATE TRIGGER noted AFTER UPDATE OF at ON event_2 FOR EACH ROW EXECUTE FUNCTION note();
ALTER TABLE event_2 DISABLE TRIGGER noted;
CREATE POLICY recent ON event USING (at IS NOT NULL);
CREATE POLICY leaf ON event_1 TO reader USING (at IS NOT NULL);
CREATE RULE leaf_rule AS ON INSERT TO event_4 WHERE NEW.at IS NULL DO INSTEAD NOTHING;
CREATE PUBLICATION told FOR TABLE ONLY event (id, at), ONLY event_1 (id, at);
},
	},
	{
		name => 'inherited: int to bigint, keys and identity in the children, foreign keys to them',
		table => 'orders', column => 'id', type => 'bigint', rows => 300,
		setup => q{
CREATE TABLE customer (id int PRIMARY KEY);
INSERT INTO customer SELECT generate_series(1, 100);
CREATE TABLE orders (id int, n int);
CREATE TABLE orders_a (id int GENERATED BY DEFAULT AS IDENTITY, CONSTRAINT "A key" PRIMARY KEY (id)) INHERITS (orders);
CREATE TABLE orders_b (PRIMARY KEY (id), FOREIGN KEY (id) REFERENCES customer ON DELETE CASCADE) INHERITS (orders);
CREATE TABLE orders_c (CHECK (id > 0)) INHERITS (orders_b);
INSERT INTO orders SELECT NULLIF(g, 7), g FROM generate_series(1, 100) g;
INSERT INTO orders_a (n) SELECT g FROM generate_series(1, 100) g;
INSERT INTO orders_b SELECT g, g FROM generate_series(1, 50) g;
INSERT INTO orders_c SELECT g, g FROM generate_series(1, 50) g;
CREATE TABLE line (order_id int, CONSTRAINT "line's order" FOREIGN KEY (order_id) REFERENCES orders_a ON DELETE SET NULL DEFERRABLE);
INSERT INTO line SELECT generate_series(1, 100);
COMMENT ON CONSTRAINT "A key" ON orders_a IS 'the key';
},
	},
);

$node->safe_psql('postgres', 'CREATE ROLE reader; CREATE ROLE keeper LOGIN; GRANT keeper TO CURRENT_USER;
	CREATE ROLE hoarder; GRANT hoarder TO keeper');
$node->safe_psql('postgres', "CREATE TABLESPACE elsewhere LOCATION ''");
$node->safe_psql('postgres', 'GRANT CREATE ON TABLESPACE elsewhere TO keeper, hoarder');

# each scenario gets some databases that have the extension already
$node->safe_psql('postgres', 'CREATE DATABASE kit');
$node->safe_psql('kit', 'CREATE EXTENSION risky_migrations');

# What pg_dump says of the scenario's schema, as comparable lines.
sub dump_of
{
	my ($db) = @_;
	my ($out, $err);
	IPC::Run::run(
		[ 'pg_dump', '-s', '-n', 'it', '-d', $node->connstr($db) ],
		'>', \$out, '2>', \$err) or die $err;
	$out =~ s/^\\(?:un)?restrict .*\n//mg;
	return $out;
}

# The same without what only tells the order of columns: lines are sorted and
# lose the comma that separates them.
sub without_order
{
	my ($dump) = @_;
	my @lines = grep { /\S/ && !/^--/ } split /\n/, $dump;
	s/,$// for @lines;
	# statistics list their columns in the table's order
	s/^(CREATE STATISTICS .* ON )(.*)( FROM .*)$/$1 . join(', ', sort split m{, }, $2) . $3/e for @lines;
	return join "\n", sort @lines;
}

sub make
{
	my ($db, $s, $column, $around) = @_;
	(my $setup = $s->{setup}) =~ s/\bTHE_COLUMN\b/$column/g;
	$node->safe_psql('postgres', "CREATE DATABASE $db TEMPLATE kit STRATEGY file_copy");
	$node->safe_psql($db, qq{
CREATE SCHEMA it AUTHORIZATION keeper;
GRANT USAGE ON SCHEMA it TO reader;
GRANT USAGE, CREATE ON SCHEMA it TO hoarder;
GRANT CREATE ON DATABASE $db TO keeper;
SET ROLE keeper; SET search_path = it;
$setup} . ($around // ''));
}

# Runs the statements as the owner, who is no superuser; each by itself.
sub as_owner
{
	my ($db, @statements) = @_;
	my ($out, $err);
	my $ok = IPC::Run::run(
		[
			'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr($db) . ' user=keeper',
			map { ('-c', $_) } 'SET search_path = it, public', @statements
		],
		'>', \$out, '2>', \$err);
	return $ok ? '' : $err || 'failed';
}

my $n = 0;
foreach my $s (@scenarios)
{
	my $column = $s->{column};
	my $ident = $column =~ /^[a-z_]+$/ ? $column : qq{"$column"};
	my $using = $s->{using} ? "\$\$$s->{using}\$\$" : 'NULL';
	my $q = sub { "\$\$$_[0]\$\$" };
	my $add = sprintf 'CALL rm_add_column(%s, %s, %s, %s)', $q->($s->{table}), $q->($column),
	  $q->($s->{type}), $using;
	my @steps = ($s->{settings} // (), $add, 'CALL rm_backfill_batched()', 'CALL rm_enforce_not_null()', 'CALL rm_swap()');
	$n++;

	make("back_$n", $s, $ident, $s->{around});
	$node->safe_psql("back_$n", 'ANALYZE');
	my $before = dump_of("back_$n");
	my $found = $node->safe_psql("back_$n", $s->{same} // 'SELECT');
	make("alter_$n", $s, $ident);
	my $data = $node->safe_psql("alter_$n", "SELECT md5(string_agg(t::text, ',' ORDER BY t::text)) FROM it.$s->{table} t");
	is(as_owner("alter_$n", "ALTER TABLE $s->{table} ALTER COLUMN $ident TYPE $s->{type}"
		. ($s->{using} ? " USING $s->{using}" : ''),
		@{ $s->{lost} // [] }), '', "$s->{name}: ALTER TABLE");
	is(as_owner("alter_$n", $s->{around}), '', "$s->{name}: what ALTER TABLE would not have around it") if $s->{around};
	my $altered = dump_of("alter_$n");
	# from 18 on it also gives the parent's name to the NOT NULL of partitions
	while (my ($given, $own) = each %{ $s->{not_null} // {} })
	{
		$altered =~ s/\Q$given\E/$own/;
	}

	make("forth_$n", $s, $ident, $s->{around});
	is(as_owner("forth_$n", @steps), '', "$s->{name}: the three steps and the swap, as the owner");
	is($node->safe_psql("forth_$n", "SELECT count(*) FROM it.$s->{table}"), $s->{rows}, "$s->{name}: all rows");
	is(as_owner("forth_$n", 'CALL rm_cleanup()'), '', "$s->{name}: cleanup");
	is(without_order(dump_of("forth_$n")), without_order($altered), "$s->{name}: as after ALTER TABLE");
	is($node->safe_psql("forth_$n", $s->{same}), $found, "$s->{name}: and the same is found in it")
	  if $s->{same};
	is( $node->safe_psql("forth_$n", q{SELECT string_agg(relname, ', ') FROM pg_class WHERE relname ~ '^rm_[no]_'}),
		'', "$s->{name}: nothing is left lying about");

	is(as_owner("back_$n", @steps, 'CALL rm_rollback()'), '', "$s->{name}: there and back");
	is(dump_of("back_$n"), $before, "$s->{name}: as before, to the letter");
	is($node->safe_psql("back_$n", "SELECT md5(string_agg(t::text, ',' ORDER BY t::text)) FROM it.$s->{table} t"),
		$data, "$s->{name}: and so are the rows");
	is($node->safe_psql("back_$n", $s->{same}), $found, "$s->{name}: and what is found in it")
	  if $s->{same};
	is( $node->safe_psql("back_$n", q{SELECT string_agg(relname, ', ') FROM pg_class WHERE relname ~ '^rm_[no]_'}),
		'', "$s->{name}: nothing is left lying about on the way back");
}

# The sequence of an identity column is the same one, with what it had.
is($node->safe_psql('forth_1', q{SET search_path = it; INSERT INTO orders (x) VALUES ('next') RETURNING id}),
	7 + 3 * 500, 'the sequence goes on where it was');

# An index that somebody makes while the way back, already planned, waits for its
# lock behind a reader: refused, for it would go with the column.
{
	my $name = 'while_going_back';
	$node->safe_psql('postgres', "CREATE DATABASE $name TEMPLATE kit");
	$node->safe_psql($name, q{
CREATE TABLE item (id int PRIMARY KEY, v int);
INSERT INTO item SELECT g, g FROM generate_series(1, 100) g});
	$node->psql($name, q{CALL rm_alter_type('item', 'v', 'bigint')});
	my $reader = $node->background_psql($name);
	$reader->query_safe('BEGIN; LOCK TABLE item IN ACCESS SHARE MODE');
	$node->safe_psql($name, q{ALTER DATABASE while_going_back SET risky_migrations.lock_retries = 1000});
	$node->safe_psql($name, q{ALTER DATABASE while_going_back SET risky_migrations.lock_retry_max_delay = 100});
	my ($out, $err) = ('', '');
	my $back = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr($name), '-c', 'CALL rm_rollback()' ], '<', \undef, '>', \$out, '2>', \$err);
	$node->poll_query_until($name, q{SELECT waiting_for = 'lock' FROM rm_progress}) or die 'the way back does not wait';
	$node->safe_psql($name, 'CREATE INDEX late ON item (v)');
	$reader->query_safe('COMMIT');
	$back->finish;
	like($err, qr/something has been added to the new column.*index late/s, 'an index made while the way back waits: refused');
	$node->safe_psql($name, 'DROP INDEX late');
	is($node->psql($name, 'CALL rm_rollback()'), 0, 'and once it is dropped the way back is free');
	$reader->quit;
}

$node->stop;
done_testing();
