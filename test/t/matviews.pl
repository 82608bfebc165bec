# Materialized views on the column are filled again beside everybody: while that
# takes, the table is read and written, and the views are read.  What somebody
# refreshes meanwhile is not older afterwards.  What cannot be filled is told
# before the columns change places, in both directions, and nothing is left of it.
#
# The view "slow" takes as long to fill as the table gate has no pass for it.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_server(
	'matviews', q{
max_worker_processes = 20
risky_migrations.lock_retries = 1000
risky_migrations.lock_retry_max_delay = 50
});

sql(q{
CREATE TABLE gate (passes int);
INSERT INTO gate VALUES (1000);
CREATE TABLE broken ();
CREATE FUNCTION gate() RETURNS int LANGUAGE plpgsql AS $$
BEGIN
	IF EXISTS (SELECT FROM public.broken) THEN
		RAISE EXCEPTION 'the view is out of order';
	END IF;
	LOOP
		UPDATE public.gate SET passes = passes - 1 WHERE passes > 0;
		EXIT WHEN FOUND;
		PERFORM pg_sleep(0.01);
	END LOOP;
	RETURN 1;
END $$;
CREATE TABLE sale (id int PRIMARY KEY, v int NOT NULL, day int);
INSERT INTO sale SELECT g, g, g % 10 FROM generate_series(1, 1000) g;
CREATE TABLE beside (id int);
CREATE VIEW below AS SELECT day, v FROM sale;
CREATE MATERIALIZED VIEW other AS SELECT day, max(v) AS top FROM below GROUP BY day;
CREATE UNIQUE INDEX ON other (day);
CREATE MATERIALIZED VIEW slow AS SELECT top FROM below, (SELECT max(v) AS top FROM sale) s, gate() LIMIT 1;
CREATE VIEW above AS SELECT o.day, s.top FROM other o, slow s;
CREATE FUNCTION types() RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(attrelid::regclass || '.' || attname || ' ' || format_type(atttypid, NULL), ', ' ORDER BY attrelid::regclass::text)
	FROM pg_attribute WHERE (attrelid, attname) IN (('sale'::regclass, 'v'), ('below'::regclass, 'v'), ('other'::regclass, 'top'), ('slow'::regclass, 'top'), ('above'::regclass, 'top')) $$;
CREATE FUNCTION lying_about() RETURNS text LANGUAGE sql AS
	$$SELECT string_agg(relname, ', ') FROM pg_class WHERE relname ~ '^_*rm_[nox]_'$$;
});

my $filling = q{(SELECT waiting_for = 'refresh' AND waiting_reason = 'REFRESH MATERIALIZED VIEW public.slow' FROM rm_progress)};
my $alter = q{CALL rm_alter_type('sale', 'v', 'bigint')};
my $allow = 'SET risky_migrations.recreate_matviews = on';
my $impatient = q{SET lock_timeout = '50ms'};

# What it complains of.
sub fails
{
	my (@statements) = @_;
	my $call = start_call('fails', @statements);
	return finish_call($call) ? 'nothing' : $call->{err};
}

sub types_are
{
	my ($type, $name) = @_;
	return is(sql('SELECT types()'), "above.top $type, below.v $type, other.top $type, sale.v $type, slow.top $type", $name);
}

# refused without the setting, and what it cannot do
like(fails($alter), qr/materialized view public\.other.*materialized view public\.slow.*recreate_matviews = on/s,
	'refused unless it is allowed, with all of them');
sql('CREATE MATERIALIZED VIEW keyed AS SELECT id, v FROM sale GROUP BY id');
like(fails($allow, q{CALL rm_alter_type('sale', 'id', 'bigint')}),
	qr/must appear in the GROUP BY.*before the primary key is on the new column.*Name in its GROUP BY/s,
	'one that needs the primary key as it will be: refused');
is(sql('SELECT lying_about()'), '', 'with nothing left of it');
is(sql(q{SELECT count(*) FROM pg_attribute WHERE attrelid = 'sale'::regclass AND attnum > 0 AND NOT attisdropped}), 3, 'nor of the column');
sql('DROP MATERIALIZED VIEW keyed');

# cancelled while it fills: the way back takes it away
sql('UPDATE gate SET passes = 0');
my $call = start_call('first', $allow, $alter);
becomes($filling, 'it fills');
sql('SELECT rm_cancel()');
ok(!finish_call($call), 'it is cancelled');
like(sql('SELECT lying_about()'), qr/rm_n_/, 'the copies are there');
sql('CALL rm_rollback()');
is(sql('SELECT lying_about()'), '', 'and go with the way back');
types_are('integer', 'all is as it was');

# nobody waits while it fills
$call = start_call('second', $allow, $alter);
becomes($filling, 'it fills again');
is(sql("$impatient; SELECT max(v) FROM sale"), 1000, 'the table is read meanwhile');
is(sql("$impatient; SELECT max(top) FROM above"), 1000, 'and the views');
sql("$impatient; INSERT INTO sale VALUES (2000, 2000, 5)");
pass('and it is written');
sql("$impatient; REFRESH MATERIALIZED VIEW CONCURRENTLY other");
is(sql('SELECT max(top) FROM other'), 2000, 'one that was filled is refreshed');
my $old = $node->background_psql('postgres');
$old->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM beside');
sql('UPDATE gate SET passes = 1000');
ends_well($call, 'it goes on to the end');
types_are('bigint', 'all of them have the new type');
is(sql('SELECT max(top) FROM other'), 2000, 'what was refreshed meanwhile is no older than it was');
is($old->query_safe('SELECT count(*) FROM other'), 10, 'an older snapshot finds rows in it');
$old->query_safe('COMMIT');
$old->quit;
is(sql('SELECT lying_about()'), '', 'no copy lies about');

# the way back: what cannot be filled leaves all as it is
sql('INSERT INTO broken DEFAULT VALUES');
like(fails('CALL rm_rollback()'), qr/out of order.*A copy of materialized view public\.slow was being filled.*then CALL rm_rollback/s,
	'one that cannot be filled keeps it from going back');
types_are('bigint', 'nothing has changed');
is(sql('SELECT max(top) FROM above'), 2000, 'the views are read');
unlike(sql('SELECT lying_about()') // '', qr/rm_o_\d+_\d+/, 'and no copy lies about');
sql('DELETE FROM broken; UPDATE gate SET passes = 0');
$call = start_call('back', 'CALL rm_rollback()');
becomes($filling, 'then it fills on the way back');
is(sql("$impatient; SELECT max(top) FROM above"), 2000, 'beside those who read');
sql("$impatient; INSERT INTO sale VALUES (3000, 3000, 5)");
sql("$impatient; REFRESH MATERIALIZED VIEW other");
sql('UPDATE gate SET passes = 1000');
ends_well($call, 'and is back');
types_are('integer', 'with the old type');
is(sql('SELECT max(top) FROM other'), 3000, 'and what was refreshed meanwhile');
is(sql('SELECT lying_about()'), '', 'no copy lies about');

# an index that is made after all was built, before the copies are: carried over
my $snapshot = $node->background_psql('postgres');
$snapshot->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM beside');
$call = start_call('late', $allow, $alter);
becomes(q{(SELECT step = 'swap' AND waiting_for = 'snapshot' FROM rm_progress)}, 'all is built, it waits for a snapshot');
sql('CREATE INDEX late ON sale (v)');
$snapshot->query_safe('COMMIT');
$snapshot->quit;
ends_well($call, 'it goes on to the end once more');
is(sql(q{SELECT pg_get_indexdef('late'::regclass, 1, true)}), 'v', 'with the index that was made meanwhile');
sql('CALL rm_rollback(); DROP INDEX late');

# one that is refreshed all the time: told, not tried for ever
sql('UPDATE gate SET passes = 0');
$call = start_call('third', $allow, $alter);
my $copy = 0;
foreach my $round (1 .. 10)
{
	my $next = q{(SELECT max(oid) FROM pg_class WHERE relname = (SELECT format('rm_n_%s_%s', max(id), 'slow'::regclass::oid) FROM rm_migrations))};
	wait_for("$next <> $copy AND $filling");
	$copy = sql("SELECT $next");
	sql('REFRESH MATERIALIZED VIEW other; UPDATE gate SET passes = 1');
}
ok(!finish_call($call), 'refreshed all the time');
like($call->{err}, qr/have changed 10 times while they were filled/, 'it says so');
sql('UPDATE gate SET passes = 1000');
sql('CALL rm_rollback()');
is(sql('SELECT lying_about()'), '', 'and leaves nothing when it is taken back');

$node->stop;
done_testing();
