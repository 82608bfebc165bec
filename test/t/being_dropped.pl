# A child, or a view on the column, that somebody is dropping at the moment when a
# migration looks at it: it is waited for, and then it is no matter any more.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_server('being_dropped', 'autovacuum = off');
my %drop = (
	child => 'DROP TABLE family2',
	view => 'DROP VIEW family_view',
	'view on a view' => 'DROP VIEW on_view',
	policy => 'DROP POLICY visible ON reader');

sub make_table
{
	my ($children) = @_;
	sql(q{CREATE TABLE family (id int PRIMARY KEY, v text NOT NULL);
		INSERT INTO family VALUES (1, '1');
		CREATE INDEX ON family (v);
		CREATE TABLE reader (id int);
		ALTER TABLE reader ENABLE ROW LEVEL SECURITY});
	sql('CREATE TABLE family1 (PRIMARY KEY (id)) INHERITS (family); CREATE TABLE family2 (PRIMARY KEY (id)) INHERITS (family)')
	  if $children;
	return;
}

# What direct does not go with is made only for that which is dropped.
sub make_around
{
	my ($what) = @_;
	sql('CREATE VIEW family_view AS SELECT v FROM family') if $what =~ /view/;
	sql('CREATE VIEW on_view AS SELECT v FROM family_view') if $what =~ /on a view/;
	sql('CREATE POLICY visible ON reader USING (EXISTS (SELECT v FROM family))') if $what eq 'policy';
	return;
}

# The call, while somebody drops that.
sub beside
{
	my ($what, $statement, $name) = @_;
	my $dropper = $node->background_psql('postgres');

	$dropper->query_safe("BEGIN; $drop{$what}");
	my $call = start_call('migration', 'SET risky_migrations.lock_timeout = 20000', $statement);
	becomes(q{(SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'migration' AND wait_event_type = 'Lock')},
		"$name waits for it");
	$dropper->query_safe('COMMIT');
	$dropper->quit;
	ends_well($call, "$name goes on without it");
	return;
}

sub is_changed
{
	my ($name) = @_;
	is(sql('SELECT pg_typeof(v), v FROM family'), 'bigint|1', "$name: to its end");
	sql(q{SET client_min_messages = error; DROP TABLE family, reader CASCADE});
	return;
}

foreach my $what (sort keys %drop)
{
	foreach my $method (qw(online_rewrite three_step direct))
	{
		# ALTER TABLE would not go with them, and that is seen without a lock on them
		next if $method eq 'direct' && $what ne 'child';
		make_table($what eq 'child');
		make_around($what);
		beside($what, "CALL rm_alter_type('family', 'v', 'bigint', 'v::bigint', method => '$method')", "$what, $method");
		sql('CALL rm_cleanup()') if $method eq 'three_step';
		is_changed("$what, $method");
	}
	foreach my $method (qw(online_rewrite three_step))
	{
		make_table($what eq 'child');
		make_around($what);
		sql("CALL rm_alter_type('family', 'v', 'bigint', 'v::bigint', '$method', cut_over => 'manual')");
		beside($what, 'CALL rm_cut_over()', "$what, cut-over of $method");
		sql('CALL rm_cleanup()') if $method eq 'three_step';
		is_changed("$what, cut-over of $method");
	}
}

$node->stop;
done_testing();
