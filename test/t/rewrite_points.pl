# online_rewrite, broken off at each point of the way: an error, or the death of the
# backend (kill -9), after each command that changes a definition, and where each
# transaction writes down how far it is.  Whatever the point the table is what it was or what
# it should be, and nothing in between; from there the migration goes on to its end, or back.
#
# The points are made by triggers, which count: an event trigger, which sees all commands of
# the steps, those on the empty copies too; and one on the migration's row.
#
# By RM_POINTS=all tools/test -- rewrite_points (some minutes) the backend is killed at all
# points, else only in the exchange.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_server('rewrite_points', q{
autovacuum = off
restart_after_crash = on
risky_migrations.lock_retries = 20
});
my $rows = 300;

# The session says what happens at which of them.  They are counted by a sequence,
# which no rollback takes back.
sql(q{
CREATE SEQUENCE points;
CREATE FUNCTION point(kind text, what text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
	n int;
BEGIN
	IF kind IS DISTINCT FROM current_setting('point.kind', true) THEN
		RETURN;
	END IF;
	n := nextval('public.points');
	IF n = nullif(current_setting('point.at', true), '')::int THEN
		IF current_setting('point.kill') = 'on' THEN
			COPY (SELECT 1) TO PROGRAM 'kill -9 $PPID';
			PERFORM pg_sleep(60);
		END IF;
		RAISE EXCEPTION 'point % after %', n, what USING ERRCODE = 'RMX01';
	END IF;
END $$;
CREATE FUNCTION definition_point() RETURNS event_trigger LANGUAGE plpgsql AS
	'BEGIN PERFORM public.point($$definition$$, tg_tag); END';
CREATE FUNCTION state_point() RETURNS trigger LANGUAGE plpgsql AS
	'BEGIN PERFORM public.point($$state$$, tg_op); RETURN NULL; END';
CREATE TRIGGER points AFTER INSERT OR UPDATE ON risky_migrations.migration EXECUTE FUNCTION state_point();
});

sub make_table
{
	sql(qq{
DROP EVENT TRIGGER IF EXISTS points;
DROP TABLE IF EXISTS item, child CASCADE;
CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL CONSTRAINT small CHECK (v < 100000), want bigint, UNIQUE (v));
INSERT INTO item SELECT g, g * 3, g * 3 FROM generate_series(1, $rows) g;
CREATE INDEX item_i ON item (v DESC, id) WHERE v > 0;
CREATE TABLE child (item int CONSTRAINT to_item REFERENCES item (v) ON UPDATE CASCADE);
INSERT INTO child SELECT v FROM item;
CREATE VIEW item_view AS SELECT id, v FROM item;
ALTER TABLE item ENABLE ROW LEVEL SECURITY;
CREATE POLICY visible ON item USING (v > 0);
COMMENT ON COLUMN item.v IS 'what';
CREATE EVENT TRIGGER points ON ddl_command_end EXECUTE FUNCTION definition_point();
});
	return;
}

sub dump_of_tables { return dump_of('-t', 'item*', '-t', 'child') }

# The call in a session of its own, broken off at that point; its status and what
# it complains of.
sub broken_off
{
	my ($call, $kind, $at, $kill) = @_;
	my ($status, $out, $err) = $node->psql('postgres',
		"SELECT pg_backend_pid(); SELECT setval('points', 1, false); SET point.kind = $kind; SET point.at = $at; SET point.kill = $kill;\n$call");
	if ($kill eq 'on' && $status != 0)
	{
		my ($pid) = split /\n/, $out;

		comes_back_after($pid) or die 'the server does not come back';
	}
	return ($status, $err);
}

make_table();
my $before = dump_of_tables();
sql(q{DROP VIEW item_view; DROP POLICY visible ON item; ALTER TABLE item ALTER v TYPE bigint;
	CREATE VIEW item_view AS SELECT id, v FROM item; CREATE POLICY visible ON item USING (v > 0)});
my $altered = dump_of_tables();

# The table as it is: all of the one, or all of the other.
sub check
{
	my ($name) = @_;
	my $dump = dump_of_tables() =~ s/^CREATE TRIGGER "~rm_log_.*\n+|^ALTER TABLE .* ENABLE ALWAYS TRIGGER "~rm_log_.*\n+//mgr;
	my $is = $dump eq $before ? 'before' : $dump eq $altered ? 'altered' : $dump =~ s/ NOT VALID//r eq $altered ? 'unproven' : $dump;

	is(sql('SELECT count(*), sum((v <> want)::int), (SELECT count(*) FROM child JOIN item ON v = item) FROM item'),
		"$rows|0|$rows", "$name: every row is right");
	return $is;
}

sub goes_on
{
	my ($name, $back) = @_;

	for (1 .. 5)
	{
		my $id = sql(q{SELECT id FROM rm_migrations WHERE state = 'open'}) or last;
		my $done = sql("SELECT steps_done FROM rm_migrations WHERE id = $id");
		my $state = check($name);

		like($state, $done > 5 ? qr/^(altered|unproven)$/ : qr/^before$/, "$name: after $done steps the definitions are those");
		if ($back && $done <= 5)
		{
			sql("CALL rm_rollback($id)");
		}
		else
		{
			my $next = sql("SELECT next_call FROM rm_migrations WHERE id = $id");
			sql($next);
			# in a worker
			wait_for("(SELECT state <> 'open' OR next_call LIKE 'CALL rm_cut_over%' FROM rm_migrations WHERE id = $id)",
				"$name: $next comes to no end") if $next =~ /rm_resume/;
		}
	}
	is(sql(q{SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d'}), 0, "$name: nothing is left");
	return check($name);
}

my $call = q{rm_alter_type('item', 'v', 'bigint', method => 'online_rewrite'};
my $all = ($ENV{RM_POINTS} // '') eq 'all';
my @ways = (
	# kind, kill, of the cut-over alone
	[ 'definition', 'off', 0 ],
	[ 'definition', 'on', !$all ],
	[ 'state', 'off', 0 ]);
push @ways, [ 'state', 'on', 0 ] if $all;
foreach my $way (@ways)
{
	my ($kind, $kill, $exchange) = @$way;
	my %seen;
	my $at;

	for ($at = 1; $at < 200; $at++)
	{
		my $name = ($kill eq 'on' ? 'killed' : 'error') . " at point $at of $kind";
		my $back = $at % 2;

		make_table();
		sql("CALL $call, cut_over => 'manual')") if $exchange;
		my ($status, $err) = broken_off($exchange ? 'CALL rm_cut_over()' : "CALL $call)", $kind, $at, $kill);
		last if $status == 0;
		like($err, $kill eq 'on' ? qr/server closed the connection|connection to server was lost/ : qr/ERROR:  point $at after/, "$name: it is broken off there");
		my $end = goes_on($name, $back);
		like($end, qr/^(before|altered)$/, "$name: an end");
		$seen{"$end"}++;
	}
	cmp_ok($at, '<', 200, 'each point was come to');
	is(goes_on('at none', 0), 'altered', 'and after the last it comes to its end');
	cmp_ok($seen{before} // 0, '>', 3, 'some went back');
	cmp_ok($seen{altered} // 0, '>', 3, 'and some went on');
	note join ', ', map { "$_: $seen{$_}" } sort keys %seen;
}

$node->stop;
done_testing();
